"""Megatron's experts, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes.engines.megatron.expert_kinds.base import ExpertKind, ExpertTensor

if TYPE_CHECKING:
    from moe.layer import MoELayer


class SequentialExperts(ExpertKind):
    """Experts of ``SequentialMLP``: a dense network each, one after the other."""

    name = "megatron"
    summary = "Megatron's own experts"

    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """See `ExpertKind.slot`."""
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.spec_utils import ModuleSpec

        from recipes.engines.megatron.layer_slots import slot_of

        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return slot_of(SequentialMLP, version, ModuleSpec, {}, submodules)

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        found = []
        for place, expert in enumerate(module.local_experts):
            found.append(ExpertTensor(expert.linear_fc1.weight, "w_up_EUD", place))
            found.append(ExpertTensor(expert.linear_fc2.weight, "w_down_EDF", place))
        return found
