"""Stop signals are noted while a run goes on, and after an error until that has been told."""

from __future__ import annotations

import signal
import sys

import pytest

from recipes.runtime.interrupt import StopRequest, end_by_signal, restored_handlers
from tests.forked_commands import run_forked


def test_an_error_is_told_before_a_signal_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with restored_handlers():
        with pytest.raises(RuntimeError), StopRequest() as request:
            raise RuntimeError("a rank is lost")
        signal.raise_signal(signal.SIGTERM)
        assert request.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_ends_well_leaves_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("early", [True, False])
def test_a_rank_that_does_not_speak_is_ended(early: bool) -> None:
    assert run_forked(_silent, early).code == -signal.SIGTERM


def _silent(early: bool) -> None:
    try:
        with StopRequest():
            raise RuntimeError("a rank is lost")
    except RuntimeError:
        pass
    if early:
        signal.raise_signal(signal.SIGTERM)
    end_by_signal()
    signal.raise_signal(signal.SIGTERM)
    sys.exit("it lives")
