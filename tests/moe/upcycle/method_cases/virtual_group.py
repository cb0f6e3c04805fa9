"""Virtual groups."""

from __future__ import annotations

from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        VirtualGroupConfig(scale="cube_root"),
        VirtualGroupConfig(scale="none"),
        VirtualGroupConfig(granularity=1),
        VirtualGroupConfig(granularity=4),
    ),
    exact=True,
)
