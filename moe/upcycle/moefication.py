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
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, FFNShape, LayerPlan, NeuronRows, RouterStart
from moe.upcycle.neuron_split import coactivation_groups, groups_of
from moe.upcycle.partition import division_faults, parts_plan
from moe.upcycle.snake import unit_faults

_SPARSE = ("relu", "relu2")


class MoEfication(UpcycleMethod[MoEficationConfig]):
    """Method that divides a ReLU network, with mean rows as the router."""

    name = "moefication"
    config_class = MoEficationConfig
    starts_router = True

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

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires a ReLU network, parts of one width, and a linear router that sums its experts."""
        E, found = self.config.num_experts, unit_faults(router, self.config.num_experts)
        if not found and not observe(router, E).has_rows:
            rule = "it has no row for each expert that could begin at the mean row of its neurons"
            found.append(Mistake("router.name", router.name, rule, "Set router=unit_linear."))
        if shape is None:
            return found
        if shape.activation not in _SPARSE:
            rule = f"it is for networks with ReLU, and the dense one has {shape.activation!r}: no neuron is 0"
            remedy = "Choose cmoe or llama_moe, which need no zeros."
            found.append(Mistake("upcycle.name", self.config.name, rule, remedy))
        return found + division_faults(E, shape)

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
