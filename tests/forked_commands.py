"""Runs functions and commands in processes that are forked from the server, and keeps what they print."""

from __future__ import annotations

import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fork_server import Forked
from tests.paths import ROOT
from tests.patience import patience


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def run_forked(
    fn: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    seconds: float = 240.0,
) -> Ended:
    """Runs ``fn(*args)`` in a process of its own.

    Args:
        fn: Function at the top level of a module; the exit code is the int that it returns or exits with.
        *args: Picklable arguments.
        environment: All variables; by default those of this process.
        cwd: Working directory.
        seconds: Much more than it takes on an idle machine.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = {"stdout": out.fileno(), "stderr": err.fileno()}
        with Forked(fn, *args, **files, environment=environment, cwd=cwd) as forked:
            code = forked.wait(patience(seconds))
        out.seek(0)
        err.seek(0)
        ended = Ended(-1 if code is None else code, out.read(), err.read())
    assert code is not None, f"not done after {patience(seconds):.0f} s: {ended}"
    return ended


def run_module(name: str, *arguments: str, cwd: Path = ROOT) -> Ended:
    """Runs ``python -m NAME ARGUMENTS``."""
    return run_forked(_run_module, name, arguments, cwd=cwd)


def run_code(code: str, *arguments: str, cwd: Path = ROOT) -> Ended:
    """Runs ``python -c CODE ARGUMENTS``."""
    return run_forked(_run_code, code, arguments, cwd=cwd)


def _run_code(code: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def _run_module(name: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
