"""GShard's routing."""

from __future__ import annotations

from moe.routers.configs.gshard_config import GShardConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        GShardConfig(second="mesh_tf", z_coef=0.1),
        GShardConfig(second="sampled", balance_scope="global_batch"),
        GShardConfig(second="always", balance_scope="sequence"),
    ),
    excused={
        "draws": "whether the second expert is asked depends on the place of the token",
        "inexactness": "weights sum to 1 where the second expert is asked in any case, as in evaluation",
    },
)
