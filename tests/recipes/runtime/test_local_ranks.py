"""Ranks that are started without torchrun's command."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path

from recipes.runtime.local_ranks import start_ranks
from recipes.runtime.rank_lines import pass_on
from tests.fork_server import Forked
from tests.forked_commands import run_forked
from tests.patience import patience

# Ranks write whole lines at once: print writes the end of a line by itself, behind what another has written.
_SAYS = """
import os, sys
os.write(1, f'out {os.environ["RANK"]} {os.environ["WORLD_SIZE"]}\\n'.encode())
os.write(2, f'err {os.environ["RANK"]} {sys.argv[1:]}\\n'.encode())
"""
_FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("error: a sentence", file=sys.stderr, flush=True)
    sys.exit(2)
time.sleep(600)
"""
_KILLED = "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(600)"
_RESTARTS = """
import os, sys
print("try", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""
_WAITS = """
import os, pathlib, signal, sys, time
def end(number, frame):
    os.write(1, b"saved\\n")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(600)
"""


def test_a_line_that_comes_while_its_rank_ends_is_passed_on(tmp_path: Path) -> None:
    log, out, finished = tmp_path / "log", io.StringIO(), threading.Event()
    log.write_text("one\ntw")

    class Ends(threading.Event):
        """Its rank writes the last line, and ends, right after it was asked whether it has."""

        def is_set(self) -> bool:
            before = finished.is_set()
            if not before:
                with log.open("a") as file:
                    file.write("o\nlast")
                finished.set()
            return before

    pass_on("[1] ", str(log), out, Ends(), 0.0)
    assert out.getvalue() == "[1] one\n[1] two\n[1] last"


def test_lines_of_the_other_ranks_begin_with_their_rank() -> None:
    ended = run_forked(start_ranks, 2, ["-c", _SAYS, "a b"])
    assert ended.code == 0
    assert sorted(ended.out.splitlines()) == ["[rank 1] out 1 2", "out 0 2"]
    assert sorted(ended.err.splitlines()) == ["[rank 1] err 1 ['a b']", "err 0 ['a b']"]


def test_a_mistake_is_all_that_is_said() -> None:
    ended = run_forked(start_ranks, 2, ["-c", _FAILS])
    assert (ended.code, ended.out, ended.err) == (2, "", "[rank 1] error: a sentence\n")


def test_a_rank_that_was_killed_is_named() -> None:
    ended = run_forked(start_ranks, 2, ["-c", _KILLED])
    assert ended.code == 1 and not ended.out
    assert ended.err.startswith("error: rank 1 was ended by SIGKILL. If memory ran out,")
    assert len(ended.err.splitlines()) == 1


def test_ranks_are_started_again() -> None:
    ended = run_forked(start_ranks, 1, ["-c", _RESTARTS], 1)
    assert (ended.code, ended.out) == (0, "try 0\ntry 1\n")


def test_signals_are_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        Forked(start_ranks, 2, ["-c", _WAITS, str(tmp_path)], stdout=out.fileno()) as run,
    ):
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert run.wait(0.05) is None
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(patience(60)) == 130
    assert sorted(log.read_text().splitlines()) == ["[rank 1] saved", "saved"]
