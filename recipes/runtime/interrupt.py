"""Requests to stop: after Ctrl-C, SIGTERM or a closed terminal, the loop saves and ends at the next step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

INTERRUPTED = 130
"""Exit code of a command that was asked to stop."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTICE = b"\nstopping: this step is finished and saved first; Ctrl-C once more ends at once\n"


@contextlib.contextmanager
def restored_handlers() -> Iterator[None]:
    """Restores the handlers of stop signals at its end: an error leaves those of a `StopRequest` in place."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def end_by_signal() -> None:
    """Lets SIGTERM end this process again; it ends now where that has arrived since an error."""
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    request = getattr(handler, "__self__", None)
    if isinstance(request, StopRequest) and request.requested:
        signal.raise_signal(signal.SIGTERM)


class StopRequest:
    """Handler of stop signals: while entered, the first one sets `requested`, a second one interrupts.

    Attributes:
        requested: Whether a signal has arrived.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        """Prepares to handle signals; ``verbose`` announces the first one on stderr."""
        self.requested = False
        self._verbose = verbose
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            # A signal that the command ignores (SIGHUP under nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # An error is told first: where a rank is lost, torchrun ends the others with SIGTERM at once.
            if number == signal.SIGINT or not isinstance(error, Exception):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._verbose and not self.requested:
            os.write(2, _NOTICE)  # not by print: a signal may arrive while stderr is being written
        # torchrun passes SIGTERM on to ranks that already got the terminal's Ctrl-C: that is one request.
        self.requested = True
