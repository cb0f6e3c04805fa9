"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop; the loop saves and ends at the next step."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTICE = b"\nstopping: this step is finished and saved first; Ctrl-C once more ends at once\n"


class StopRequest:
    """While entered, the first signal sets `requested`; a second one interrupts at once.

    Attributes:
        requested: Whether a signal has come.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        """Says so on stderr when a signal comes, on the rank that ``verbose``."""
        self.requested = False
        self._verbose = verbose
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            # What the command was told to ignore (SIGHUP under nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._verbose and not self.requested:
            os.write(2, _NOTICE)  # not by print: a signal may come while stderr is being written
        # torchrun passes a SIGTERM on to ranks that already had the terminal's Ctrl-C: that is one request.
        self.requested = True
