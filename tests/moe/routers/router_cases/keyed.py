"""Routing by a key of the caller's. Its forms stand in its own tests."""

from __future__ import annotations

from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(excused={"relabelling": "the key is the expert"})
