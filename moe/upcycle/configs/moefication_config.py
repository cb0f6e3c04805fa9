"""Options of `moe.upcycle.moefication`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes

_SPARSE = ("relu", "relu2")


@dataclass(frozen=True)
class MoEficationConfig(UpcycleConfig):
    """Config of `MoEfication`."""

    starts_router: ClassVar[bool] = True
    name: Literal["moefication"] = "moefication"
    split: Literal["cluster", "coactivation"] = "coactivation"
    """Balanced k-means of the normalised up rows, or a balanced partition of the graph of neurons that are
    active for the same tokens."""

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires a ReLU network, and parts of one width."""
        found = []
        if shape is not None and shape.activation not in _SPARSE:
            rule = f"it is for networks with ReLU, and the dense one has {shape.activation!r}: no neuron is 0"
            remedy = "Choose cmoe or llama_moe, which need no zeros."
            found.append(Mistake("upcycle.name", self.name, rule, remedy))
        E = self.num_experts
        return found + division_mistakes(shape, E, "num_experts", E, "Set a divisor.")
