"""Options of the Megatron engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import Mistake, Rule
from moe.types import unless
from recipes.engines.config import ProcessConfig, dims_mistake
from recipes.engines.megatron.dispatchers import dispatchers
from recipes.engines.megatron.gpt_shape import split_mistakes, stage_mistakes

if TYPE_CHECKING:
    from moe.routers.configs import RouterConfig
    from recipes.engines.optim.config import OptimConfig
    from recipes.engines.run_options import DefaultModelShape, RunOptions


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
        """Requires dense attention, lengths that divide, and a default model that can be cut."""
        mistakes = []
        if run.attention is not None:
            rule = "the Megatron engine has no experts of attention"
            remedy = "Set attention=none, or engine=native."
            mistakes.append(Mistake("attention", run.attention.name, rule, remedy))
        if run.dense is None:
            mistakes += self.cut_mistakes(_default_config(run.model))
        if run.data.seq_len % self.tensor_parallel:
            rule = f"samples of {run.data.seq_len} tokens do not divide over {self.tensor_parallel} ranks"
            remedy = "Set a divisor of data.seq_len, or 1."
            mistakes.append(Mistake("engine.tensor_parallel", self.tensor_parallel, rule, remedy))
        return mistakes

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
    return value in names, field, "there is none of this name", f"Choose {', '.join(names)}."


def _default_config(model: DefaultModelShape) -> dict[str, Any]:
    """Returns the shape of the default model, as its ``config.json`` will have it."""
    return {
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": 0,
        "rms_norm_eps": 0.0,
    }
