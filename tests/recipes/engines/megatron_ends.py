"""What a layout of Megatron is built of, and how ranks leave it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.patience import patience


class TroubleError(Exception):
    """Ends a run on a rank; its argument is whether the other had come or was gone."""


def classes(engine: Any, train_module: Any) -> list[str]:
    """Of a layer's experts, of their first matrices, of its dispatcher, and of what sends for that."""
    moe = train_module.chunk.module.decoder.layers[0].mlp
    up = getattr(moe.experts, "linear_fc1", None)
    manager = getattr(moe.token_dispatcher, "_comm_manager", None)
    return [type(part).__name__ for part in (moe.experts, up, moe.token_dispatcher, manager)]


def comes_late(engine: Any, train_module: Any, step: Callable[..., Any], sign: Path) -> bool:
    """One rank comes to the end of a layout that is in use while the other has been there for a while."""
    from megatron.core.transformer.moe import fused_a2a

    step(engine, train_module, 0)
    if engine.rank == 1:
        time.sleep(0.5)
        sign.touch()
    return fused_a2a._buffer is not None


def came_before(sign: Path) -> bool:
    """Whether the late one had come when this one was through, and nothing is left of the layout."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import fused_a2a

    gone = fused_a2a._buffer is None and not parallel_state.model_parallel_is_initialized()
    return sign.exists() and gone


def comes_never(engine: Any, train_module: Any, sign: Path) -> None:
    """One rank ends in trouble; the other does not come until it is gone."""
    sign.unlink(missing_ok=True)
    engine.barrier()
    deadline = time.monotonic() + patience(30.0)
    while engine.rank == 1 and not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    raise TroubleError(engine.rank == 0 or sign.exists())


def log_gone(rank: int, sign: Path) -> None:
    """Tells the other rank that this one is gone."""
    if rank == 0:
        sign.touch()
