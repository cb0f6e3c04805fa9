"""Options of the upcycling methods, one module each, which imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import Config
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_choice import LayerChoice, parse_layers

#: More than any mixture of feed-forward networks has; a plan has an entry for each.
_MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class UpcycleConfig(Config):
    """Config that every method has.

    Attributes:
        starts_router: True if the method sets the router's rows, which nothing else may set then.
    """

    starts_router: ClassVar[bool] = False
    name: str
    """The method's name, as in ``conf/upcycle/NAME.yaml``."""
    num_experts: int = 8
    """Routed experts of each MoE layer."""
    layers: str | list[int] = "all"
    """Layers that become MoE layers: ``all``, ``every:N`` or ``every:N:OFFSET``, ``last:N``, ``inner:N`` (all
    but N at either end), or a list of indices."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.num_experts >= 2,
                "num_experts",
                "a mixture has at least two experts",
                "Set it to 2 or more.",
            ),
            (
                self.num_experts <= _MOST_EXPERTS,
                "num_experts",
                f"the number of experts of a layer is at most {_MOST_EXPERTS}",
                "Set a smaller one.",
            ),
        )
        parse_layers(self.layers)

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Returns why the method cannot be used, as options and shapes tell; empty if it can.

        Args:
            router: The router's config, which has passed its own check.
            shape: Shape of the dense network; None while unknown.
        """
        return []

    @property
    def source_folders(self) -> tuple[str, ...]:
        """Folders of further dense checkpoints, of the same shape as the upcycled one."""
        return ()

    @property
    def layer_choice(self) -> LayerChoice:
        """The parsed `layers`."""
        return parse_layers(self.layers)
