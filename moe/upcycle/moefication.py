"""MoEfication: neurons of a ReLU network with similar rows, or that fire together, form experts.

Source: Zhang et al. 2022 (arXiv 2110.01786). Few of a ReLU network's neurons are active for a token, so that
a fifth of the experts can carry most of its output. Experts are chosen by the similarity of the token to
their mean row and summed; the selector that the paper trains for better choices is not implemented.

Letters: E experts, F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from moe.errors import Mistake
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.moefication_config import MoEficationConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, LayerPlan, NeuronRows, RouterStart
from moe.upcycle.neuron_split import coactivation_groups, groups_of
from moe.upcycle.partition import parts_plan
from moe.upcycle.snake import unit_faults


class MoEfication(UpcycleMethod[MoEficationConfig]):
    """Method that divides a ReLU network, with mean rows as the router."""

    name = "moefication"
    config_class = MoEficationConfig

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic that the split needs."""
        return ("row_clusters_F" if self.config.split == "cluster" else "coactivation_FF",)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Asks for as many clusters as experts."""
        if self.config.split == "coactivation":
            return {}
        return {"row_clusters_F": {"num_clusters": self.config.num_experts}}

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True if every token uses every expert, while the router is untrained."""
        return router.weighs_one and router.top_k == router.num_experts

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Requires a linear router that sums its experts."""
        E = self.config.num_experts
        found = unit_faults(router, E)
        if not found and not observe(router, E).has_rows:
            rule = "it has no row for each expert that could begin at the mean row of its neurons"
            found.append(Mistake("router.name", router.name, rule, "Set router=unit_linear."))
        return found

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Divides the neurons by the split."""
        E, found = self.config.num_experts, statistics[self.statistics[0]]
        if self.config.split == "cluster":
            groups_EM = groups_of(found, E)
        else:
            groups_EM = coactivation_groups(found, E, draws.generator("split"))
        plan = parts_plan(list(groups_EM), 1.0, self.gates)
        matrix: Literal["gate", "up"] = "gate" if shape.gated else "up"
        return replace(plan, router=RouterStart(rows_ED=NeuronRows(matrix, groups_EM)))
