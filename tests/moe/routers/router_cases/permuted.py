"""Permuted routers without a search. With one, the scores have a gradient in some steps and none in others,
which no case can say: `tests/moe/routers/test_router_permuted.py` holds those to the rest of the contract."""

from __future__ import annotations

from moe.routers.configs.comet_config import CometConfig
from moe.routers.configs.permuted_config import PermutedConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(PermutedConfig(inner=CometConfig(entropy_coef=0.0)),),
    excused={"relabelling": "the permutation holds numbers of experts, and so may the router in it"},
)
