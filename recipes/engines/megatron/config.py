"""Options of the Megatron engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import Mistake, Rule, choose
from moe.types import unless
from recipes.engines.config import ProcessConfig, dims_mistake
from recipes.engines.megatron.dispatchers import DispatchSetup, dispatchers
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.megatron.gpt_shape import family_mistakes, split_mistakes, stage_mistakes
from recipes.engines.run_options import model_config
from recipes.models.hf.config_file import trusts

if TYPE_CHECKING:
    from moe.routers.configs import RouterConfig
    from recipes.engines.optim.config import OptimConfig
    from recipes.engines.run_options import RunOptions


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
            _known("experts", self.experts, expert_kinds()),
            _known("dispatcher", self.dispatcher, dispatchers()),
        ]

    @property
    def model_parallel_size(self) -> int:
        """Ranks that see the same samples: tensor-parallel ranks of all stages."""
        return self.tensor_parallel * self.pipeline_parallel

    def check_dims(self, world_size: int) -> Mistake | None:
        """Requires ranks that divide into stages, and stages that divide into groups of the other kinds."""
        stages = self.pipeline_parallel
        if world_size % stages:
            rule = f"{world_size} ranks do not divide into stages"
            remedy = f"Set a divisor of {world_size}, or start a multiple of {stages} ranks."
            return Mistake("pipeline_parallel", stages, rule, remedy)
        ranks = world_size // stages
        whose = None if stages == 1 else f"the {ranks} ranks of each of {stages} stages"
        names = ("tensor_parallel", "expert_parallel")
        return dims_mistake(self, ranks, *names, whose=whose, groups=stages)

    def check_moe(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Requires experts that divide over the ranks, and a routing that maps tokens to experts."""
        mistakes = super().check_moe(num_experts, router)
        mistakes += dispatchers()[self.dispatcher].route_mistakes(num_experts, router)
        remedy = "Set engine=native, or choose another router."
        if router.mixes_tokens:
            rule = "its experts see mixtures of tokens, and Megatron's layer sends tokens as they are"
            mistakes.append(Mistake("router.name", router.name, rule, remedy))
        elif router.reads_experts:
            rule = "it reads the weights of the experts, which Megatron's layer does not show it"
            mistakes.append(Mistake("router.name", router.name, rule, remedy))
        return mistakes

    def check_optimizer(self, optim: OptimConfig) -> list[Mistake]:
        """Requires AdamW."""
        if optim.name == "adamw":
            return []
        rule = "the Megatron engine has AdamW alone"
        return [Mistake("optim.name", optim.name, rule, "Set adamw, or engine=native.")]

    def check_run(self, run: RunOptions) -> list[Mistake]:
        """Requires dense attention, lengths that divide, a model that can be cut, and parts that fit."""
        mistakes = self._model_mistakes(run)
        if run.attention is not None:
            rule = "the Megatron engine has no experts of attention"
            remedy = "Set attention=none, or engine=native."
            mistakes.append(Mistake("attention", run.attention.name, rule, remedy))
        if run.data.seq_len % self.tensor_parallel:
            rule = f"samples of {run.data.seq_len} tokens do not divide over {self.tensor_parallel} ranks"
            remedy = "Set a divisor of data.seq_len, or 1."
            mistakes.append(Mistake("engine.tensor_parallel", self.tensor_parallel, rule, remedy))
        kind = expert_kinds()[self.experts]
        if run.experts.lora.rank and not kind.keeps_ours:
            rule = f"{kind.summary} have no low-rank factors"
            remedy = "Set engine.experts=graft, or experts.lora.rank=0."
            mistakes.append(Mistake("experts.lora.rank", run.experts.lora.rank, rule, remedy))
        return mistakes + (self.device_mistakes("cpu") if self.is_on_cpu() else [])

    def device_mistakes(self, device: str) -> list[Mistake]:
        """Returns the reasons why experts and dispatcher cannot be used on a ``cpu`` or ``cuda`` device."""
        setup = DispatchSetup(device, self.precision, self.expert_parallel)
        mistakes = expert_kinds()[self.experts].mistakes(device)
        return mistakes + dispatchers()[self.dispatcher].mistakes(setup)

    def _model_mistakes(self, run: RunOptions) -> list[Mistake]:
        """Returns the reasons why Megatron's GPT model cannot be what the run upcycles."""
        dense = model_config(run)
        if dense is None or run.dense is None:
            return [] if dense is None else self.cut_mistakes(dense)
        mistakes = []
        if "auto_map" in dense and trusts(Path(run.dense).expanduser(), run.trust_remote_code):
            rule = "it is computed by code of its own, and Megatron builds models itself"
            mistakes.append(Mistake("dense", run.dense, rule, "Use engine=native."))
        return mistakes + (family_mistakes(dense, run.dense, run.data.seq_len) or self.cut_mistakes(dense))

    def cut_mistakes(self, dense: Mapping[str, Any]) -> list[Mistake]:
        """Returns the reasons why a decoder of a supported family cannot be sharded as configured.

        Args:
            dense: The content of its ``config.json``.
        """
        return split_mistakes(dense, self.tensor_parallel) + stage_mistakes(dense, self.pipeline_parallel)

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.tensor_parallel > 1, "tensor_parallel is 1", "sequence_parallel")


def _known(field: str, value: str, names: Iterable[str]) -> Rule:
    """Returns the rule that a value is one of some names."""
    return value in names, field, "there is none of this name", choose(value, names)
