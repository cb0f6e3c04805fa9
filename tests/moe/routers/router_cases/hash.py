"""Hash layers."""

from __future__ import annotations

from moe.routers.configs.hash_config import HashConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        HashConfig(top_k=3, table_size=101),
        HashConfig(table="balanced", top_k=2, table_size=101),
        HashConfig(table="modulo", top_k=2, table_size=50),
    ),
    excused={"relabelling": "the table holds expert ids"},
)
