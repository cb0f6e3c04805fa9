"""Expert 0 always, and the best of the others."""

from __future__ import annotations

from moe.routers.configs.xft_config import XFTConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(XFTConfig(top_k=3, balance_scope="sequence", z_coef=0.1),),
    excused={"relabelling": "expert 0 is used by every token and has no row"},
)
