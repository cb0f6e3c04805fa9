"""Drop-Upcycling."""

from __future__ import annotations

from moe.upcycle.configs.drop_config import DropConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        DropConfig(num_experts=4, ratio=0.25, independent=True),
        DropConfig(num_experts=4, change="noise"),
        DropConfig(num_experts=4, ratio=0.0),
        DropConfig(num_experts=4, ratio=1.0),
    )
)
