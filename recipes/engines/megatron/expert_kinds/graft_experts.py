"""Our stacked experts in Megatron's layers."""

from __future__ import annotations

from typing import Any

from moe.layer import MoELayer
from recipes.engines.megatron.expert_kinds.base import ExpertKind, ExpertTensor
from recipes.engines.megatron.slots import experts_slot


class GraftExperts(ExpertKind):
    """The host's own: stacked weights, our kernels, with low-rank factors where there are any."""

    name = "graft"
    told = "Graft's stacked experts"
    keeps_ours = True

    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """See `ExpertKind.slot`."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        return experts_slot(layer, version, ModuleSpec)

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        named = module.experts.named_parameters()
        return [ExpertTensor(tensor, name, stacked=True) for name, tensor in named]
