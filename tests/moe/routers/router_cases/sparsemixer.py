"""SparseMixer."""

from __future__ import annotations

from moe.routers.configs.sparsemixer_config import SparseMixerConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        SparseMixerConfig(version="v1", top_k=1, balance_scope="global_batch"),
        SparseMixerConfig(top_k=1, z_coef=0.1),
        SparseMixerConfig(jitter=1.0, balance_coef=0.0),
    ),
    excused={
        "draws": "the sampled expert depends on the place of the token",
        "finite_differences": "an estimate of another difference; its own tests check its mean",
    },
)
