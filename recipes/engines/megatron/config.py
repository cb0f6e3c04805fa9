"""Options of the Megatron engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe.errors import Rule
from moe.types import unless
from recipes.engines.config import ProcessConfig
from recipes.engines.megatron.dispatchers import dispatchers


@dataclass(frozen=True)
class MegatronConfig(ProcessConfig):
    """Options of `MegatronEngine`."""

    name: Literal["megatron"] = "megatron"
    tensor_parallel: int = 1
    """Neighbouring ranks over which all matrices but the experts' are sharded; they see the same samples."""
    sequence_parallel: bool = True
    """Whether these ranks also shard sequences between the matrices, as Megatron's MoE layers require."""
    pipeline_parallel: int = 1
    """Pipeline stages of consecutive blocks; the first ranks hold the first stage."""
    experts: str = "graft"
    """``graft``: Graft's stacked experts and their kernels; ``megatron``: Megatron's own, one after the
    other; ``te``: those of TransformerEngine, by grouped products."""
    dispatcher: str = "alltoall"
    """How tokens reach the ranks of their experts: ``alltoall``, ``allgather``, or with DeepEP ``deepep`` or
    ``hybridep``."""
    distributed_optimizer: bool = True
    """Whether the optimizer state is sharded over the data-parallel ranks."""

    def rules(self) -> list[Rule]:
        """Returns the rules of the options."""
        return [
            *super().rules(),
            (
                self.tensor_parallel >= 1,
                "tensor_parallel",
                "must be at least 1",
                "Give 1 for whole matrices.",
            ),
            (
                self.tensor_parallel == 1 or self.sequence_parallel,
                "sequence_parallel",
                "must be true with tensor_parallel above 1: Megatron's MoE layers do not train without",
                "Set it to true.",
            ),
            (self.pipeline_parallel >= 1, "pipeline_parallel", "must be at least 1", "Give 1 for one stage."),
            *self._kind_rules(),
            _known("dispatcher", self.dispatcher, dispatchers()),
        ]

    def _kind_rules(self) -> list[Rule]:
        """Returns the rule of the kind of experts. Kinds are torch code: the default imports none."""
        if self.experts == "graft":
            return []
        from recipes.engines.megatron.expert_kinds import expert_kinds

        return [_known("experts", self.experts, expert_kinds())]

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.tensor_parallel > 1, "tensor_parallel is 1", "sequence_parallel")


def _known(field: str, value: str, names: Iterable[str]) -> Rule:
    """Returns the rule that a value is one of some names."""
    return value in names, field, "there is none of this name", f"Choose {', '.join(names)}."
