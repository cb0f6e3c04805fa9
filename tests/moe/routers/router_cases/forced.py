"""Round-robin routing. With K = 1 its weights have no gradient, as its own tests say."""

from __future__ import annotations

from moe.routers.configs.forced_config import ForcedConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(ForcedConfig(top_k=3, balance_coef=0.01, z_coef=0.1), ForcedConfig(top_k=4)),
    excused={
        "permutation": "a token's experts follow from its place",
        "relabelling": "the experts are dealt out by their number",
        "finite_differences": "the weights are constant and carry the gradient of other ones",
    },
)
