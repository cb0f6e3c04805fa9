"""Experts of equal importance, dealt out back and forth, under weights of ``1 + logit``.

Source: He et al. 2025 (arXiv 2512.02351, sparsity in unified multimodal models). The released code treats one
part of one model, and its shared expert has a learned weight of ``1 + gate(x)``; ours weighs 1.

Letters: E routed experts, F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe.errors import Mistake
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.snake_config import SnakeConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws, LayerPlan
from moe.upcycle.neuron_split import snake_groups
from moe.upcycle.partition import parts_plan


class Snake(UpcycleMethod[SnakeConfig]):
    """Method that divides the neurons so that every expert has the same importance."""

    name = "snake"
    config_class = SnakeConfig

    @property
    def statistics(self) -> tuple[str, ...]:
        """The importance of neurons."""
        return ("output_importance_F" if self.config.importance == "output" else "importance_F",)

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True if every token uses every expert, while the router is untrained."""
        return router.weighs_one and router.top_k == router.num_experts

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Requires a router that sums its experts."""
        return unit_faults(router, self.config.num_experts)

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Shares the most important neurons and deals out the others."""
        config, score_F = self.config, statistics[self.statistics[0]]
        order_F = score_F.argsort(descending=True, stable=True)
        count = config.num_shared * (shape.width // (config.num_experts + config.num_shared))
        shared_F, left_F = order_F[:count].sort().values, order_F[count:]
        groups_EM = left_F[snake_groups(score_F[left_F], config.num_experts)].sort(dim=1).values
        return parts_plan(list(groups_EM), 1.0, self.gates, shared_F if count else None)


def unit_faults(router: RouterConfig, num_experts: int) -> list[Mistake]:
    """Requires a router whose chosen experts begin at weight 1 each."""
    if router_class(router.name)(router, 8, num_experts).weighs_one:
        return []
    rule = "its experts do not begin at weight 1 each, and those of this method are summed"
    remedy = (
        "Set router=one_plus or router=unit_linear, or choose upcycle=llama_moe, which scales its experts."
    )
    return [Mistake("router.name", router.name, rule, remedy)]
