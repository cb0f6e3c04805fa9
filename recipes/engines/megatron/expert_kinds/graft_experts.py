"""Graft's own experts in Megatron's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes.engines.megatron.expert_kinds.base import ExpertKind, ExpertTensor

if TYPE_CHECKING:
    from moe.layer import MoELayer


class GraftExperts(ExpertKind):
    """Graft's experts: stacked weights, with Graft's kernels and low-rank factors."""

    name = "graft"
    summary = "Graft's stacked experts"
    keeps_ours = True

    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """See `ExpertKind.slot`."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from recipes.engines.megatron.layer_slots import ExpertsSlot, slot_of

        return slot_of(ExpertsSlot, version, ModuleSpec, {"layer": layer})

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        named = module.experts.named_parameters()
        return [ExpertTensor(tensor, name, stacked=True) for name, tensor in named]
