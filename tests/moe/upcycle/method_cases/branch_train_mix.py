"""Branch-Train-MiX."""

from __future__ import annotations

from moe.upcycle.branch_train_mix import BranchTrainMixConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        BranchTrainMixConfig(num_experts=4, sources=["branch"]),
        BranchTrainMixConfig(num_experts=6, sources=["a", "b"], keep_seed=False),
    )
)
