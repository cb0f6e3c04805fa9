"""Expert choice."""

from __future__ import annotations

from moe.routers.configs.expert_choice_config import ExpertChoiceConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        ExpertChoiceConfig(renormalise=True),
        ExpertChoiceConfig(score="sigmoid", top_k=1),
        ExpertChoiceConfig(scope="sequence", top_k=3),
    ),
    excused={"inexactness": "renormalised weights sum to 1 as long as some expert takes every token"},
)
