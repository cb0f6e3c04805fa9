"""Whether an upcycling method fits router and network, as mistakes of a user's config."""

from __future__ import annotations

from typing import Any

from moe.errors import Mistake
from moe.routers import RouterConfig
from moe.upcycle import UpcycleMethod
from moe.upcycle.layer_plan import FFNShape


def method_mistakes(
    method: UpcycleMethod[Any], router: RouterConfig, shape: FFNShape | None
) -> list[Mistake]:
    """What the method's own check finds.

    Args:
        method: The method.
        router: The router's config; its own check has passed.
        shape: Of the dense network; None while it is not known.
    """
    return method.check(router, shape)
