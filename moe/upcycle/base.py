"""What every upcycling method is: from a dense feed-forward network to the plan of a layer of experts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from moe.errors import Mistake, require
from moe.experts.weights import FFNWeights
from moe.routers.base import Router, RouterConfig
from moe.types import Config
from moe.upcycle.build_experts import BuiltLayer, build_layer, ffn_shape
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_choice import LayerChoice, parse_layers
from moe.upcycle.layer_plan import Draws, FFNShape, LayerPlan


@dataclass(frozen=True)
class UpcycleConfig(Config):
    """What every method's config holds."""

    name: str
    """The method's name, as in ``conf/upcycle/NAME.yaml``."""
    num_experts: int = 8
    """Routed experts of each MoE layer."""
    layers: str | list[int] = "all"
    """Which layers become mixtures: ``all``, ``every:N`` or ``every:N:OFFSET``, ``last:N``, ``inner:N`` (all
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
        )
        parse_layers(self.layers)

    @property
    def layer_choice(self) -> LayerChoice:
        """The parsed `layers`."""
        return parse_layers(self.layers)


ConfigT = TypeVar("ConfigT", bound=UpcycleConfig)


class UpcycleMethod(ABC, Generic[ConfigT]):
    """Plans a layer's experts out of its dense feed-forward network.

    A subclass sets `name` and `config_class` and is found by being a module of `moe.upcycle`.

    Attributes:
        name: The value of ``upcycle.name`` that picks this class.
        config_class: The typed config it is built from.
        starts_router: Whether it sets the router's rows, which others then must not.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[UpcycleConfig]]
    starts_router: ClassVar[bool] = False

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self._router: RouterConfig | None = None

    def for_router(self, router: RouterConfig) -> Self:
        """The same method, told of the router that it plans for; `check` has found nothing.

        Args:
            router: The router's config.
        """
        told = copy.copy(self)
        told._router = router
        return told

    @property
    def gates(self) -> Gates:
        """What the experts of a token weigh, for methods whose plan depends on it."""
        assert self._router is not None, f"{self.name} plans for a router: take for_router(config) of it"
        return observe(self._router, self.config.num_experts)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what it must be told of each layer's activations on real text (`moe.upcycle.statistics`).

        None for a method that looks at weights alone.
        """
        return ()

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Options of statistics, by their names; also of those that are only needed on the way to others."""
        return {}

    @property
    def aligns_outputs(self) -> bool:
        """Whether the layers' outputs are given the spread of the dense network's, as real text shows it."""
        return False

    @property
    def sources(self) -> tuple[str, ...]:
        """Folders of dense checkpoints besides the one that is upcycled, all of one shape."""
        return ()

    @property
    def num_sources(self) -> int:
        """How many dense checkpoints there are: the one that is upcycled is number 0, then `sources`."""
        return 1 + len(self.sources)

    @property
    def averaged(self) -> tuple[int, ...]:
        """The dense checkpoints that all parameters outside the mixtures are the mean of."""
        return (0,)

    @abstractmethod
    def is_exact(self, router: Router[Any]) -> bool:
        """Whether the mixture computes the same function as the dense network before training."""

    @abstractmethod
    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Plans one layer. Randomness comes from the draws alone.

        Args:
            shape: Of the dense network.
            draws: The layer's randomness.
            statistics: The layer's statistics by their name in `statistics`.
        """

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Why the method does not fit the router or the network; empty when it does.

        Args:
            router: The router's config.
            shape: Of the dense network; None while it is not known.
        """
        return []

    def build(
        self,
        ffns: FFNWeights | Sequence[FFNWeights],
        draws: Draws,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> BuiltLayer:
        """Plans a layer and makes its weights in memory."""
        networks = [ffns] if isinstance(ffns, FFNWeights) else list(ffns)
        plan = self.plan(ffn_shape(networks[0]), draws, statistics or {})
        return build_layer(plan, networks, draws)
