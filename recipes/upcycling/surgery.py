"""Surgery that a config describes, from dense networks to MoE layers."""

from __future__ import annotations

from typing import Any

from moe.dispatch.local import LocalDispatcher
from moe.routers import Router, router_class
from moe.upcycle import upcycle_methods
from recipes.config.schema import RunConfig
from recipes.models.hf.ffn_surgery import Surgery


def make_surgery(config: RunConfig) -> Surgery:
    """Returns the surgery that a config describes."""

    def make_router(model_width: int, num_experts: int) -> Router[Any]:
        return router_class(config.router.name)(config.router, model_width, num_experts)

    return Surgery(
        method=upcycle_methods()[config.upcycle.name](config.upcycle),
        make_router=make_router,
        make_dispatcher=LocalDispatcher,
        backend=config.experts.backend,
        seed=config.seed,
    )
