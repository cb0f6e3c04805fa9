"""Kinds of experts in Megatron's layers.

Nothing here imports megatron-core, or an optional package, before `ExpertKind.slot` or `ExpertKind.mistakes`
is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moe.errors import ConfigError, Mistake
from moe.layer import MoELayer
from recipes.engines.megatron.layer_slots import ExpertsSlot, slot_of
from recipes.engines.megatron.packages import find_optional

# First version of TransformerEngine with the grouped linear layers that Megatron uses.
_SINCE = "1.9"
_REMEDY = "Install transformer-engine, or set engine.experts=graft."


@dataclass(frozen=True, eq=False)
class ExpertTensor:
    """Parameter of one or more of the experts that a rank holds.

    Attributes:
        tensor: The parameter.
        name: Name of the stack that it is a part of, as in `moe.experts.experts.Experts`.
        first: Index of its first expert, among those of this rank.
        stacked: Whether its first axis counts experts; otherwise it is a matrix of a single expert.
    """

    tensor: Tensor
    name: str
    first: int = 0
    stacked: bool = False


class ExpertKind(ABC):
    """Kind of experts in Megatron's layers.

    Attributes:
        name: Value of ``engine.experts`` that picks it.
        summary: The implementation, in a few words.
        keeps_ours: Whether Graft's own experts compute; otherwise Megatron builds others, with their weights.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    keeps_ours: ClassVar[bool] = False

    @classmethod
    def mistakes(cls, device: str) -> list[Mistake]:
        """Returns the reasons why it cannot be used on a ``cpu`` or ``cuda`` device of this machine."""
        return []

    def fields(self) -> dict[str, Any]:
        """Returns fields of Megatron's ``TransformerConfig`` that it needs."""
        return {}

    @abstractmethod
    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """Returns what goes into ``MoESubmodules.experts``.

        Args:
            layer: Graft's MoE layer.
            version: Version of megatron-core, e.g. ``(0, 16, 1)``.
        """

    @abstractmethod
    def tensors(self, module: Any) -> list[ExpertTensor]:
        """Returns the parameters of the module that Megatron has built from the slot."""


class GraftExperts(ExpertKind):
    """Graft's experts: stacked weights, with Graft's kernels and low-rank factors."""

    name = "graft"
    summary = "Graft's stacked experts"
    keeps_ours = True

    def slot(self, layer: MoELayer, version: tuple[int, ...]) -> Any:
        """See `ExpertKind.slot`."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        return slot_of(ExpertsSlot, version, ModuleSpec, {"layer": layer})

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        named = module.experts.named_parameters()
        return [ExpertTensor(tensor, name, stacked=True) for name, tensor in named]


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

        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return slot_of(SequentialMLP, version, ModuleSpec, {}, submodules)

    def tensors(self, module: Any) -> list[ExpertTensor]:
        """See `ExpertKind.tensors`."""
        found = []
        for place, expert in enumerate(module.local_experts):
            found.append(ExpertTensor(expert.linear_fc1.weight, "w_up_EUD", place))
            found.append(ExpertTensor(expert.linear_fc2.weight, "w_down_EDF", place))
        return found


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


def expert_kinds() -> dict[str, type[ExpertKind]]:
    """Returns every kind by the value of ``engine.experts`` that picks it."""
    return {kind.name: kind for kind in (GraftExperts, SequentialExperts, TransformerEngineExperts)}
