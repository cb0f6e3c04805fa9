"""One writer a folder: others are refused or wait, and the dead hold nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe.errors import DiskError
from recipes.runtime.claim import LOCK, GaveUpError, InUseError, claim, lock_beside, wait_for
from tests.paths import ROOT

_HOLD = """
import sys, time
from pathlib import Path
from recipes.runtime.claim import claim
with claim(Path(sys.argv[1]), "run.name", "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a lock until its input is closed."""
    command = [sys.executable, "-c", _HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "run" / LOCK
    with held_elsewhere(lock) as other:
        with pytest.raises(InUseError) as caught, claim(lock, "run.name", "run"):
            pass
        holder = f"process {other.pid} of {socket.gethostname()}, which began"
        words = f"run.name='run': {lock.parent} is in use by {holder}"
        assert str(caught.value).startswith(words) and caught.value.exit_code == 2
        other.send_signal(signal.SIGKILL)
        other.wait()
        # Its file is still there, and holds nothing any more.
        assert lock.exists()
        with claim(lock, "run.name", "run"):
            assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


def test_a_living_run_is_claimed_without_its_file_too(tmp_path: Path) -> None:
    lock = tmp_path / "run" / LOCK
    with held_elsewhere(lock):
        lock.unlink()  # as somebody does who takes it for one of a dead process
        for _ in range(2):
            with pytest.raises(InUseError, match="in use by another process"), claim(lock, "run.name", "run"):
                pass
        assert not lock.exists()
    with claim(lock, "run.name", "run"):
        assert lock.exists()


def test_within_one_process_too(tmp_path: Path) -> None:
    lock = lock_beside(tmp_path / "out")
    with claim(lock, "--out", "out"):
        with pytest.raises(InUseError, match="it is in use by process"), claim(lock, "--out", "out"):
            pass
        # A refused claim leaves the holder's alone.
        with pytest.raises(InUseError), claim(lock, "--out", "out"):
            pass
    with claim(lock, "--out", "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_what_another_makes(tmp_path: Path) -> None:
    lock, lines, polls = tmp_path / "lock", list[str](), list[int]()
    with held_elsewhere(lock) as other:

        def keep_on() -> bool:
            polls.append(1)
            assert other.stdin is not None
            if len(polls) == 2:
                other.stdin.close()
                other.wait()
            return True

        with wait_for(lock, lines.append, keep_on):
            assert str(os.getpid()) in lock.read_text()
    assert len(lines) == 1 and f"waiting for process {other.pid} of" in lines[0]


def test_waiting_may_be_given_up(tmp_path: Path) -> None:
    with (
        claim(tmp_path / "lock", "a", "b"),
        pytest.raises(GaveUpError),
        wait_for(tmp_path / "lock", lambda line: None, lambda: False),
    ):
        pass


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as other:
        assert other.stdin is not None
        other.stdin.close()
        with claim(tmp_path / "lock", "a", "b", patience_s=120.0):
            pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    with claim(tmp_path / "lock", "a", "b"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with claim(tmp_path / "lock", "a", "b"):
            pass
    finally:
        os.close(write)
        os.close(read)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path / "lock", "a", "b"):
        pass
    assert capsys.readouterr().err.count("no locks on its disk") == 1


def test_odd_files_in_the_place_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("folder", "link"):
        with pytest.raises(DiskError), claim(tmp_path / name, "a", "b"):
            pass
    os.mkfifo(tmp_path / "pipe")
    with claim(tmp_path / "pipe", "a", "b"):
        pass
    (tmp_path / "lock").write_bytes(b"\xff\0" * 9999)
    with claim(tmp_path / "lock", "a", "b"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not (tmp_path / "elsewhere").exists()
