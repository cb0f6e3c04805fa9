"""Megatron's experts with the grouped products of TransformerEngine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError, Mistake
from recipes.engines.megatron.expert_kinds.base import ExpertKind, ExpertTensor
from recipes.engines.megatron.packages import find_optional

if TYPE_CHECKING:
    from moe.layer import MoELayer

# First version of TransformerEngine with the grouped linear layers that Megatron uses.
_SINCE = "1.9"
_REMEDY = "Install transformer-engine, or set engine.experts=graft."


class TransformerEngineExperts(ExpertKind):
    """Experts of ``TEGroupedMLP``: one grouped product up and one down for all experts of a rank.

    Each expert has parameters of its own, ``linear_fc1.weight{i}`` (gate above up) and
    ``linear_fc2.weight{i}``.
    """

    name = "te"
    summary = "TransformerEngine's grouped experts"

    @classmethod
    def mistakes(cls, device: str) -> list[Mistake]:
        """Requires a GPU and the package."""
        if device != "cuda":
            rule = f"TransformerEngine computes on GPUs, and the run on {device}"
            return [Mistake("engine.experts", cls.name, rule, "Set engine.experts=graft, or megatron.")]
        _, trouble = find_optional("transformer_engine.pytorch", "GroupedLinear")
        if trouble is not None:
            rule = f"TransformerEngine cannot be used here ({trouble})"
            return [Mistake("engine.experts", cls.name, rule, _REMEDY)]
        return []

    def fields(self) -> dict[str, Any]:
        """Asks for grouped products, and a single kernel for activation, gating and combine weights."""
        return {"moe_grouped_gemm": True, "bias_activation_fusion": True}

    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """See `ExpertKind.slot`.

        Raises:
            ConfigError: Megatron has found no TransformerEngine, or one that is too old.
        """
        from megatron.core.extensions import transformer_engine
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.transformer.spec_utils import ModuleSpec

        from recipes.engines.megatron.layer_slots import slot_of

        up = transformer_engine.TEColumnParallelGroupedLinear
        down = transformer_engine.TERowParallelGroupedLinear
        if up is None or down is None:
            rule = f"megatron-core has found no TransformerEngine {_SINCE} or newer"
            raise ConfigError.one("engine.experts", self.name, rule, _REMEDY)
        return slot_of(TEGroupedMLP, version, ModuleSpec, {}, MLPSubmodules(linear_fc1=up, linear_fc2=down))

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        return [
            ExpertTensor(getattr(linear, f"weight{place}"), name, place)
            for linear, name in ((module.linear_fc1, "w_up_EUD"), (module.linear_fc2, "w_down_EDF"))
            for place in range(module.num_local_experts)
        ]
