"""Stands in for the interpreter of ranks and of the workers of tests: they are forked, and import nothing.

``forked_python.py -u SCRIPT ARGUMENTS``, ``... -m MODULE ARGUMENTS`` and ``... -c CODE`` behave as ``python``
does: the same input, output, environment, network, signals and exit code. The process itself is forked from
the session's server.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_HERE = Path(__file__).resolve()
# In the order in which they are joined: the first gives the right to join the others.
_NAMESPACES = ("user", "mnt", "net", "uts")
#: Names the process that has started the rank, which is not its parent.
STARTED_BY = "GRAFT_TEST_STARTED_BY"


def interpreter(folder: Path) -> str:
    """Writes a command that is used in the place of ``python``, and returns its path."""
    path = folder / "forked-python"
    # Without site-packages: it starts in hundredths of a second.
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(_HERE))} "$@"\n')
    path.chmod(0o755)
    return str(path)


def main(arguments: list[str]) -> NoReturn:
    """Runs a command as ``python`` would, and ends as it ends."""
    from tests.fork_server import Forked

    if arguments[0] == "-u":
        del arguments[0]
    is_worker = arguments[0] == "-c"
    if not is_worker:
        # Not of what a worker starts in its turn.
        os.environ[STARTED_BY] = str(os.getppid())
    spaces = [f"/proc/{os.getpid()}/ns/{name}" for name in _NAMESPACES]
    with Forked(_run, arguments, spaces, pipes=[0] if is_worker else [], path=[]) as forked:

        def pass_on(number: int, _: Any) -> None:
            os.kill(forked.pid, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, pass_on)
        code = forked.wait()
        assert code is not None, "it waits without a limit"
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run(arguments: list[str], namespaces: list[str]) -> None:
    here = os.getcwd()
    for path in namespaces:
        _join(path)
    # Who joins other mounts stands at their root.
    os.chdir(here)
    if arguments[0] == "-c":
        from tests.fork_server import inherited

        os.dup2(inherited()[0], 0)
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _join(namespace: str) -> None:
    """Moves this process into a namespace of another, as a machine of the tests is one."""
    with open(namespace, "rb") as file:
        same = os.stat(file.fileno()).st_ino == os.stat(f"/proc/self/ns/{Path(namespace).name}").st_ino
        if not same and ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot join {namespace}")


if __name__ == "__main__":
    sys.path.insert(0, str(_HERE.parents[1]))
    # Not as ``__main__``: forked processes mean the same module.
    from tests import forked_python

    forked_python.main(sys.argv[1:])
