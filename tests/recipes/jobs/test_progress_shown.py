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

FIGURES = {"loss": 2.3456, "lr": 0.00123, "grad_norm": 0.789, "tokens_per_s": 12345.6, "mfu": 0.4321}
FIGURES |= {"router/maxvio": 0.256, "memory_bytes": 1.5 * 2**30}
SHOWN = "lr 0.0012  grad 0.79  12,346 tok/s  mfu 43.2%  maxvio 0.26  mem 1.50 GiB"
CLOCK = "recipes.training.callbacks.step_progress.time.perf_counter"


def stage(total: int = 10, first: int = 0, name: str = "moe", **later: int) -> StageInfo:
    return StageInfo(name, name, total, first, 64, later)


def show(progress: Progress, info: StageInfo, upto: int) -> None:
    progress.on_stage_start(info)
    if info.first_step == 0:
        progress.on_row(info, {"step": 0, "val_loss": 3.0}, None)
    for step in range(info.first_step + 1, upto + 1):
        progress.on_row(info, {"step": step} | FIGURES, None)
    progress.on_stage_end(info)


def without_clock(line: str) -> str:
    """The line behind the time of day, which it begins with."""
    found = re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line)
    assert found is not None, line
    return found[1]


def test_lines_come_at_the_interval_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    show(Progress(log_every=4), stage(), 10)
    lines = [without_clock(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.split("  ")[0] for line in lines] == ["moe 0/10", "moe 4/10", "moe 8/10", "moe 10/10"]
    assert lines[0] == "moe 0/10  val 3.000"
    # The validation is that of step 0: later lines do not repeat it.
    assert lines[1].startswith(f"moe 4/10  loss 2.346  {SHOWN}  eta 0:0")
    assert "eta" not in lines[-1]


def test_a_line_has_the_means_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress, info = Progress(log_every=2), stage(total=8)
    progress.on_stage_start(info)
    rows = [
        {"loss": 4.0, "tokens_per_s": 100.0},
        {"loss": 2.0, "tokens_per_s": 300.0},
        {"loss": 9.0, "tokens_per_s": 100.0, "skipped": 1},
        {"loss": 1.0, "tokens_per_s": 100.0, "val_loss": 1.5},
        {"loss": float("nan"), "tokens_per_s": 50.0, "skipped": 1},
        {"loss": float("nan"), "tokens_per_s": 50.0, "skipped": 1},
    ]
    for number, row in enumerate(rows, start=1):
        progress.on_row(info, {"step": number} | row, None)
    shown = [without_clock(line).partition("  eta")[0] for line in capsys.readouterr().out.splitlines()]
    # As many tokens at 100 a second as at 300 take (1/100 + 1/300) / 2 seconds each: 150 a second.
    assert shown == [
        "moe 2/8  loss 3.000  150 tok/s",
        "moe 4/8  loss 1.000  val 1.500  100 tok/s",
        "moe 6/8  50 tok/s",
    ]


def test_the_time_left_is_that_of_the_last_window(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(CLOCK, lambda: now[0])
    progress, info = Progress(log_every=2), stage(total=100, first=90)
    progress.on_stage_start(info)
    for step, seconds in ((91, 10.0), (92, 30.0), (93, 32.0), (94, 34.0)):
        now[0] = seconds
        progress.on_row(info, {"step": step} | FIGURES, None)
    etas = [line.partition("  eta ")[2] for line in capsys.readouterr().out.splitlines()]
    # 2 steps in 30 s: the 8 that are left take 120 s. Then 2 in 4 s: 6 take 12 s.
    assert etas == ["2:00", "0:12"]


def test_the_run_says_how_long_all_of_its_stages_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(CLOCK, lambda: now[0])
    progress = Progress(log_every=10)

    def train(info: StageInfo, seconds_a_step: float) -> list[str]:
        progress.on_stage_start(info)
        for step in range(1, info.total_steps + 1):
            # The first is slow, as it always is.
            now[0] += seconds_a_step + (50.0 if step == 1 else 0.0)
            progress.on_row(info, {"step": step} | FIGURES, None)
        return capsys.readouterr().out.splitlines()

    first, *lines = train(stage(total=20, name="dense", moe=100, cpt=100), 2.0)
    # 14 steps and 200 more of 2 s: 428 s.
    assert first == "about 7:08 to go at the speed of the first steps (dense 14, moe 100, cpt 100 steps)"
    # The first window has the slow step, 7 s a step: 10 of them, and 200 more.
    assert lines[0].endswith("eta 1:10, run ~24:30")
    lines = train(stage(total=20, cpt=100), 4.0)
    assert not any(line.startswith("about") for line in lines), "it is said once"
    # 10 steps of 9 s. The dense model is continued at the 2 s of its own last steps.
    assert lines[0].endswith("eta 1:30, run ~4:50")
    # A stage that was measured before keeps its own speed: 10 steps of 4 s, and 10 of the dense model's 2 s.
    progress.on_stage_start(again := stage(total=20, dense=10))
    for step in range(1, 11):
        now[0] += 4.0
        progress.on_row(again, {"step": step} | FIGURES, None)
    assert capsys.readouterr().out.endswith("eta 0:40, run ~1:00\n")


def test_a_stage_that_ends_before_it_tells_leaves_nothing_to_the_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(log_every=10)
    # Resumed behind step 5, it is measured from step 6 on, and the next would tell at its own step 6.
    show(progress, stage(total=8, first=5, name="dense", moe=9), 8)
    show(progress, stage(total=9, cpt=3), 9)
    assert "about" not in capsys.readouterr().out


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


@contextlib.contextmanager
def on_a_terminal(stream: TextIO) -> Iterator[None]:
    """Both streams go to it."""
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        yield


def test_a_terminal_gets_a_bar(terminal: tuple[TextIO, int]) -> None:
    stream, master = terminal
    with on_a_terminal(stream):
        show(Progress(log_every=1), stage(), 10)
        stream.flush()
    shown = everything_shown(master)
    last = shown.replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert re.match(r"moe +100%\|.*\| 10/10 \[\d+:\d+<\d+:\d+, loss 2\.346  val 3\.000", last), shown
    assert "12,346 tok/s  mfu 43.2%  maxvio 0.26" in last
    # The bar is all there is: no lines beside it.
    assert "moe 10/10" not in shown


def test_a_file_gets_lines_beside_a_terminal(
    terminal: tuple[TextIO, int], capsys: pytest.CaptureFixture[str]
) -> None:
    stream, master = terminal
    # As by `train.py ... > log`: what goes to the file is whole without the terminal.
    with contextlib.redirect_stderr(stream):
        show(Progress(log_every=5), stage(), 10)
        stream.flush()
    assert everything_shown(master) == ""
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_resumed_bar_starts_where_the_stage_does(terminal: tuple[TextIO, int]) -> None:
    stream, master = terminal
    with on_a_terminal(stream):
        progress = Progress(log_every=1)
        progress.on_stage_start(stage(first=7))
        progress.on_row(stage(first=7), {"step": 8} | FIGURES, None)
        progress.on_stage_end(stage(first=7))
        stream.flush()
    shown = everything_shown(master)
    assert "7/10" in shown and "8/10" in shown


def test_a_terminal_without_a_width_gets_lines(terminal: tuple[TextIO, int]) -> None:
    stream, master = terminal
    resize(stream.fileno(), 0)
    with on_a_terminal(stream):
        show(Progress(log_every=5), stage(), 5)
        stream.flush()
    assert len(everything_shown(master).splitlines()) == 2


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
