"""Branch-Train-MiX."""

from __future__ import annotations

from moe.upcycle.configs.branch_train_mix_config import BranchTrainMixConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        BranchTrainMixConfig(num_experts=4, sources=["branch"]),
        BranchTrainMixConfig(num_experts=6, sources=["a", "b"], keep_seed=False),
    )
)
