"""Lines of ranks, passed on as they write them, to the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TextIO


@contextmanager
def whole_lines() -> Iterator[None]:
    """Lets torch's elastic agent pass on all that ranks write, while open.

    Its own loop (torch 2.13) leaves when a rank has ended since it found nothing to read, and what the rank
    wrote in between is lost: its error, at worst.
    """
    from torch.distributed.elastic.multiprocessing import tail_log

    before = tail_log.tail_logfile
    tail_log.tail_logfile = pass_on
    try:
        yield
    finally:
        tail_log.tail_logfile = before


def pass_on(
    header: str,
    file: str,
    dst: TextIO,
    finished: Event,
    interval_sec: float,
    log_line_filter: Callable[[str], bool] | None = None,
) -> None:
    """Writes the lines of a file as they come, each behind a header, until its writer has finished.

    The arguments are those of torch's ``tail_logfile``.

    Args:
        header: Text before each line.
        file: The file; it may not be there yet.
        dst: Takes the lines.
        finished: Set once nobody writes to the file any more.
        interval_sec: Seconds between two looks.
        log_line_filter: Tells which lines are passed on; None passes all.
    """
    place, is_last = 0, False
    while not is_last:
        # Asked before the file is read: what was written until then is there.
        is_last = finished.is_set()
        found = _from(file, place)
        # Half a line waits for its end, where there may be one.
        found = found if is_last else found[: found.rfind(b"\n") + 1]
        place += len(found)
        for line in found.decode(errors="replace").splitlines(keepends=True):
            if log_line_filter is None or log_line_filter(line):
                dst.write(f"{header}{line}")
        if not is_last:
            time.sleep(interval_sec)


def _from(file: str, place: int) -> bytes:
    try:
        with open(file, "rb") as source:
            source.seek(place)
            return source.read()
    except FileNotFoundError:
        return b""
