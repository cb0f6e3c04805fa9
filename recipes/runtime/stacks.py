"""Stacks of this process: the current line of a thread, and dumps of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import traceback
from pathlib import Path
from typing import Literal

from recipes.runtime.source_root import SOURCE_ROOT, is_ours

# Innermost frames in these folders wait for other ranks, or may do so.
_COLLECTIVES = "torch/distributed/"
_BACKWARD = "torch/autograd/"


def where_is(thread: int) -> tuple[str, Literal["collective", "backward", "elsewhere"]]:
    """Returns a thread's innermost line, the innermost one of this project, and whether it waits for ranks.

    Args:
        thread: Its identifier.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended", "elsewhere"
    frames = traceback.extract_stack(frame, limit=64)
    innermost = frames[-1]
    text = f"{_short(innermost.filename)}:{innermost.lineno} {innermost.name}"
    ours = next((f for f in reversed(frames) if is_ours(f.filename)), None)
    if ours is not None and ours is not innermost:
        text += f", called from {_short(ours.filename)}:{ours.lineno} {ours.name}"
    path = innermost.filename.replace("\\", "/")
    if _COLLECTIVES in path:
        return text, "collective"
    return text, "backward" if _BACKWARD in path else "elsewhere"


def stack_of(thread: int) -> str:
    """Returns the Python stack of a thread, the innermost line last.

    Args:
        thread: Its identifier.
    """
    frame = sys._current_frames().get(thread)
    return "its thread has ended\n" if frame is None else "".join(traceback.format_stack(frame))


def dump_stacks(path: Path, headline: str, *, with_stacks: bool = True) -> None:
    """Writes the headline and the Python stacks of all threads to a file.

    A file that cannot be written is skipped: more important steps follow.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(headline + "\n\n")
            file.flush()
            if with_stacks:
                faulthandler.dump_traceback(file, all_threads=True)


def _short(filename: str) -> str:
    """Returns the path below this project's folder, or below the package's."""
    if is_ours(filename):
        return str(Path(filename).relative_to(SOURCE_ROOT))
    return filename.partition("site-packages/")[2] or filename
