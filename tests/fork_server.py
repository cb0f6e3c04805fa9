"""Server that forks processes from one that has imported everything: a start takes milliseconds, not seconds.

All workers of a test session share one (``python -m tests.fork_server FOLDER PARENT``). It has no threads,
and ends with the session. Each process that it forks gets the function, environment, folder and output that
the test names, and is killed with its children once the test drops it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import pickle
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.huge_pages import join_pages
from tests.paths import ROOT
from tests.quiet_loops import quiet

#: Names the folder of the session's server, so that all workers of the session find it.
FOLDER = "GRAFT_TEST_SERVER"
_PARENT = "GRAFT_TEST_SERVER_PARENT"
_FEW = 40  # forks after which a second spent on making them cheaper pays
_LOOK_S = 1.0  # how often the server checks that the session still runs


class ServerError(RuntimeError):
    """The server could not be started, or is gone."""


class Forked:
    """Process forked from the server: it runs a function and exits with the int that this returns."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        stdout: int = 1,
        stderr: int = 2,
        pipes: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        path: Sequence[str] | None = None,
    ) -> None:
        """Starts ``fn(*args)``.

        Args:
            fn: Function at the top level of a module.
            *args: Picklable arguments.
            stdout: File descriptor for the output; by default that of this process.
            stderr: File descriptor for the errors; by default that of this process.
            pipes: File descriptors that the process finds under new numbers in `inherited`.
            environment: All variables; by default those of this process.
            cwd: Working directory; by default that of this process.
            path: Folders of modules, before those of the server; by default all those of this process.
        """
        variables = dict(os.environ if environment is None else environment)
        where = str(cwd or Path.cwd()), variables
        with tempfile.TemporaryFile() as request:
            request.write(pickle.dumps((sys.path if path is None else path, path is None, *where)))
            request.write(pickle.dumps((fn, args)))
            request.seek(0)
            self._socket = _connect()
            fds = [request.fileno(), stdout, stderr, *pipes]
            socket.send_fds(self._socket, [b"fork"], fds)
            self.pid = int(self._receive() or "0")
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the exit code as `subprocess.Popen.returncode`, or None after ``timeout`` seconds."""
        if self.code is None:
            self._socket.settimeout(timeout)
            with contextlib.suppress(TimeoutError):
                self.code = int(self._receive())
        return self.code

    def _receive(self) -> str:
        line = self._socket.recv(16).decode()
        if not line:
            raise ServerError("the fork server is gone")
        return line

    def close(self) -> None:
        """Kills the process and its children if they still run."""
        self._socket.close()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prepare() -> None:
    """Chooses the server's folder for this process and all that it starts."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="forks-")
        os.environ[_PARENT] = str(os.getpid())


def start_server() -> Path:
    """Starts the session's server unless it runs, without waiting for its imports; returns its folder."""
    prepare()
    folder = Path(os.environ[FOLDER])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "pid").exists():
            command = [sys.executable, "-m", "tests.fork_server", str(folder), os.environ[_PARENT]]
            with (folder / "log").open("w") as log:
                server = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | quiet(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            (folder / "pid").write_text(str(server.pid))
    return folder


def stop_server() -> None:
    """Ends the server, if this process has begun the session, and removes its folder with all in it."""
    if os.environ.get(_PARENT) != str(os.getpid()):
        return
    folder = Path(os.environ.pop(FOLDER))
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)


def _connect() -> socket.socket:
    folder = start_server()
    pid = int((folder / "pid").read_text())
    while True:
        # Each message is one packet.
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(folder / "socket"))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        if not _runs(pid):
            raise ServerError((folder / "log").read_text())
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


_inherited: list[int] = []


def inherited() -> list[int]:
    """Returns, in a forked process, the file descriptors that came with it."""
    return _inherited


class Server:
    """The loop that forks, and reports how the processes ended."""

    def __init__(self, folder: Path, parent: int) -> None:
        self._parent = parent
        self._forks = 0
        self._running: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(woken, selectors.EVENT_READ)
        self._woken = woken
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Forks until the session has ended."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            self._serve()
        finally:
            for pid in list(self._running):
                self._kill(pid)

    def _serve(self) -> None:
        while _runs(self._parent):
            for key, _ in self._selector.select(_LOOK_S):
                if key.fileobj is self._listener:
                    self._fork(self._listener.accept()[0])
                elif key.fileobj == self._woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                else:
                    # The test has dropped the process: it says nothing after its request.
                    self._selector.unregister(key.fileobj)
                    self._kill(key.data)
            self._reap()

    def _fork(self, connection: socket.socket) -> None:
        fds: list[int] = []
        with contextlib.suppress(OSError):
            fds = list(socket.recv_fds(connection, 16, 64)[1])
        if not fds:
            connection.close()
            return
        if self._forks == _FEW:
            join_pages()
        self._forks += 1
        pid = os.fork()
        if not pid:
            self._become_child(connection, fds)
        for fd in fds:
            os.close(fd)
        self._running[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        with contextlib.suppress(OSError):
            connection.send(str(pid).encode())

    def _become_child(self, connection: socket.socket, fds: list[int]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        self._selector.close()
        self._listener.close()
        for other in (connection, *self._running.values()):
            other.close()
        run_child(fds)

    def _kill(self, pid: int) -> None:
        # Its group is there at the latest when it has been reaped.
        if pid in self._running:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection = self._running.pop(pid)
            # Ranks whose launcher is gone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with contextlib.suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            connection.close()


def run_child(fds: list[int]) -> NoReturn:
    """Becomes the process that a test has asked for, in one that was just forked."""
    code = 1
    try:
        os.dup2(fds[1], 1)
        os.dup2(fds[2], 2)
        _inherited[:] = fds[3:]
        with open(fds[0], "rb") as request:
            path, whole, cwd, variables = pickle.load(request)
            sys.path[:] = path if whole else [*path, *sys.path]
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(cwd)
            fn, args = pickle.load(request)
        os.close(fds[1])
        os.close(fds[2])
        code = fn(*args) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        # The interpreter is not taken apart: threads of gloo would abort it.
        os._exit(code)


def main() -> None:
    """Imports everything, then serves."""
    folder, parent = sys.argv[1:]
    gc.disable()
    importlib.import_module("tests.preload").preload()
    # Collections of the processes that it forks neither walk over what was imported, nor copy its pages.
    gc.collect()
    gc.freeze()
    gc.enable()
    random.seed()
    Server(Path(folder), int(parent)).serve()


if __name__ == "__main__":
    # Not as ``__main__``: forked processes and tests mean the same module.
    importlib.import_module("tests.fork_server").main()
