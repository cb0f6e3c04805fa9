"""Contract of the upcycling methods: from a dense feed-forward network to the plan of a layer of experts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from moe.errors import Mistake
from moe.experts.weights import FFNWeights
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.build_experts import BuiltLayer, build_layer, ffn_shape
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, LayerPlan

ConfigT = TypeVar("ConfigT", bound=UpcycleConfig)


class UpcycleMethod(ABC, Generic[ConfigT]):
    """Method that plans a layer's experts out of its dense feed-forward network.

    A subclass sets `name` and `config_class`; `moe.upcycle` finds it in whichever of its modules it stands.

    Attributes:
        name: The value of ``upcycle.name`` that picks this class.
        config_class: The typed config that it is built from.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[UpcycleConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self._router: RouterConfig | None = None

    def for_router(self, router: RouterConfig) -> Self:
        """Returns this method bound to the router that it plans for, which `check` has accepted.

        Args:
            router: The router's config.
        """
        bound = copy.copy(self)
        bound._router = router
        return bound

    @property
    def gates(self) -> Gates:
        """Combine weights of a token's experts, for methods whose plan depends on them."""
        assert self._router is not None, f"{self.name} plans for a router: call for_router(config) first"
        return observe(self._router, self.config.num_experts)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics of real activations that it needs of each layer (`moe.upcycle.statistics`).

        Empty for a method that reads weights alone.
        """
        return ()

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Options of statistics by name, intermediate statistics included."""
        return {}

    @property
    def aligns_outputs(self) -> bool:
        """True if layers' outputs are rescaled to the deviation of the dense network's on real text."""
        return False

    @property
    def sources(self) -> tuple[str, ...]:
        """Folders of further dense checkpoints, of the same shape as the upcycled one."""
        return self.config.source_folders

    @property
    def num_sources(self) -> int:
        """Number of dense checkpoints: number 0 is the upcycled one, then come `sources`."""
        return 1 + len(self.sources)

    @property
    def averaged(self) -> tuple[int, ...]:
        """Numbers of the dense checkpoints that are averaged outside the MoE layers."""
        return (0,)

    @abstractmethod
    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True if the MoE computes the dense network's function before training."""

    @abstractmethod
    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Plans one layer. Randomness comes from the draws alone.

        Args:
            shape: Shape of the dense network.
            draws: The layer's randomness.
            statistics: The layer's statistics by their name in `statistics`.
        """

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Returns why the method does not fit the router or the network; empty if it does.

        Args:
            router: The router's config, which has passed its own check.
            shape: Shape of the dense network; None while unknown.
        """
        return self.config.check(router, shape) + self.check_router(router)

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Returns why a router does not fit the method by what it shows when it runs.

        Args:
            router: The router's config, which has passed its own check.
        """
        return []

    def build(
        self,
        ffns: FFNWeights | Sequence[FFNWeights],
        draws: Draws,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> BuiltLayer:
        """Plans a layer and builds its weights in memory."""
        networks = [ffns] if isinstance(ffns, FFNWeights) else list(ffns)
        plan = self.plan(ffn_shape(networks[0]), draws, statistics or {})
        return build_layer(plan, networks, draws)
