"""Top-k routing."""

from __future__ import annotations

from moe.routers.configs.topk_config import TopKConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        *(
            TopKConfig(score=score, order=order, renormalise=renormalise, z_coef=0.1)
            for score in ("softmax", "sigmoid")
            for order in ("score_then_topk", "topk_then_score")
            for renormalise in (True, False)
        ),
        TopKConfig(top_k=1, renormalise=False),
        TopKConfig(balance_coef=0.0, importance_coef=0.1),
        TopKConfig(top_k=4),
        TopKConfig(top_k=4, score="sigmoid"),
    )
)
