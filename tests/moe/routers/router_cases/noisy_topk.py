"""Noisy top-k gating."""

from __future__ import annotations

from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        NoisyTopKConfig(form="vmoe", z_coef=0.1),
        NoisyTopKConfig(form="vmoe", top_k=1, balance_coef=0.01),
        NoisyTopKConfig(form="vmoe", noise_scale=0.0, load_coef=0.0),
        NoisyTopKConfig(noise_scale=0.0, load_coef=0.0, top_k=3),
        NoisyTopKConfig(top_k=3, importance_coef=0.0),
    ),
    unused_in_evaluation=frozenset({"noise_weight_ED"}),
    excused={"draws": "the noise on a token's logits depends on the place of the token"},
)
