"""What a person sees of a run: lines, or a bar where there is a terminal; and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from recipes.runtime.interrupt import StopRequest
from recipes.training.callbacks.base import StageInfo
from recipes.training.callbacks.step_progress import Progress

FIGURES = {"loss": 2.3456, "tokens_per_s": 12345.6, "mfu": 0.4321, "router/maxvio": 0.256}


def stage(total: int = 10, first: int = 0) -> StageInfo:
    return StageInfo("moe", "moe", total, first, 64)


def show(progress: Progress, info: StageInfo, upto: int) -> None:
    progress.on_stage_start(info)
    if info.first_step == 0:
        progress.on_row(info, {"step": 0, "val_loss": 3.0}, None)
    for step in range(info.first_step + 1, upto + 1):
        progress.on_row(info, {"step": step} | FIGURES, None)
    progress.on_stage_end(info)


def test_lines_come_at_the_interval_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    show(Progress(log_every=4), stage(), 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["moe 0/10", "moe 4/10", "moe 8/10", "moe 10/10"]
    assert lines[0] == "moe 0/10  val 3.000"
    figures = "loss 2.346  val 3.000  12,346 tok/s  mfu 43.2%  maxvio 0.26"
    assert lines[1].startswith(f"moe 4/10  {figures}  eta 0:0")
    assert "eta" not in lines[-1]


def test_the_time_left_counts_the_steps_of_this_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0])
    monkeypatch.setattr("recipes.training.callbacks.step_progress.time.perf_counter", lambda: next(clock))
    progress = Progress(log_every=1)
    progress.on_stage_start(stage(total=100, first=90))
    progress.on_row(stage(total=100, first=90), {"step": 92} | FIGURES, None)
    # 2 steps in 30 s: the 8 that are left take 120 s.
    assert capsys.readouterr().out.endswith("eta 2:00\n")


def resize(descriptor: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal to write to, and where to read what it shows."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    resize(slave, 120)
    with os.fdopen(slave, "w") as stream:
        yield stream, master
    os.close(master)


def everything_shown(master: int) -> str:
    """What the terminal holds once nothing more arrives: the kernel passes writes on in parts."""
    parts = []
    while select.select([master], [], [], 0.5)[0]:
        parts.append(os.read(master, 100_000))
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar(terminal: tuple[TextIO, int], capsys: pytest.CaptureFixture[str]) -> None:
    stream, master = terminal
    with contextlib.redirect_stderr(stream):
        show(Progress(log_every=1), stage(), 10)
        stream.flush()
    shown = everything_shown(master)
    last = shown.replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert re.match(r"moe +100%\|.*\| 10/10 \[\d+:\d+<\d+:\d+, loss 2\.346  val 3\.000", last), shown
    assert "12,346 tok/s  mfu 43.2%  maxvio 0.26" in last
    # The bar is all there is: no lines beside it.
    assert capsys.readouterr().out == ""


def test_a_resumed_bar_starts_where_the_stage_does(terminal: tuple[TextIO, int]) -> None:
    stream, master = terminal
    with contextlib.redirect_stderr(stream):
        progress = Progress(log_every=1)
        progress.on_stage_start(stage(first=7))
        progress.on_row(stage(first=7), {"step": 8} | FIGURES, None)
        progress.on_stage_end(stage(first=7))
        stream.flush()
    shown = everything_shown(master)
    assert "7/10" in shown and "8/10" in shown


def test_a_terminal_without_a_width_gets_lines(
    terminal: tuple[TextIO, int], capsys: pytest.CaptureFixture[str]
) -> None:
    stream, _ = terminal
    resize(stream.fileno(), 0)
    with contextlib.redirect_stderr(stream):
        show(Progress(log_every=5), stage(), 5)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        # What torchrun passes on after a Ctrl-C is no second request.
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
