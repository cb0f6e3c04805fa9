"""What a run does when its files change, its disk fills up, or its folder cannot be written to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from moe.errors import DataError, DiskError
from recipes import launch
from recipes.tracking.buffered_log import BufferedLog
from recipes.tracking.metrics_log import read_rows
from recipes.training.guards.watched_files import WatchedFiles, changed_everywhere
from tests.conftest import MakeCheckpoint
from tests.recipes.jobs.job_runs import Ended, job, steps, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"0123")
    os.utime(path, (1000, 1000))
    return path


def rule(change: Callable[[Path], Any], path: Path) -> str | None:
    files = WatchedFiles([path])
    assert files.changes() == []
    change(path)
    return next((mistake.rule for mistake in files.changes()), None)


def test_what_became_of_a_file(watched: Path) -> None:
    assert rule(lambda path: path.read_bytes(), watched) is None
    assert rule(lambda path: os.truncate(path, 2), watched) == (
        "it had 4 bytes when training began, and has 2 now"
    )
    written = rule(lambda path: os.utime(path, (2000, 2000)), watched)
    assert written == "it was written to at 1970-01-01 00:33:20 UTC, while it was trained on"

    def replace(path: Path) -> None:
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)

    assert rule(replace, watched) == "another file has taken its place while it was trained on"
    assert rule(Path.unlink, watched) == "it was there when training began, and cannot be found any more"


def test_one_error_for_all_ranks(watched: Path) -> None:
    files = WatchedFiles([watched])
    watched.unlink()
    error = changed_everywhere(files.changes(), None)
    assert isinstance(error, DataError) and len(error.mistakes) == 1
    assert str(watched) in str(error) and "resume=auto" in str(error)


@pytest.fixture
def go(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Ended]:
    """Runs the job on a tiny checkpoint of its own, with a cache of its own."""
    options = {
        "dense": make_checkpoint("llama", num_hidden_layers=1),
        "data.path": write_text(tmp_path / "text"),
        "run.name": "run",
        "train.save_every": 0,
        "train.eval_every": 0,
    }

    def run(changes: Mapping[str, Any] | None = None) -> Ended:
        return job(tmp_path, options | dict(changes or {}))

    return run


def test_data_that_changes_ends_the_run_with_a_checkpoint(
    go: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes.training.callbacks.recorder import Recorder

    original = Recorder.on_row

    def on_row(self: Recorder, stage: Any, row: Mapping[str, float], load: Any) -> None:
        original(self, stage, row, load)
        if row["step"] == 3:
            with next((tmp_path / "cache").rglob("*.bin")).open("ab") as file:
                file.write(b"more")

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_row", on_row)
        ended = go()
    [tokens] = (tmp_path / "cache").rglob("*.bin")
    size = tokens.stat().st_size
    assert ended.code == 2 and "Traceback" not in ended.err
    assert (
        f"error: data file={str(tokens)!r}: it had {size - 4} bytes when training began, and has" in ended.err
    )
    run_dir = tmp_path / "outputs" / "run"
    # The step that was begun with other data has updated nothing: what is saved is the step before it.
    assert steps(run_dir / "checkpoints") == [3]
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    # The cache is made again from the text, and the run goes on.
    resumed = go({"resume": "auto"})
    assert resumed.code == 0, resumed.err
    assert next((tmp_path / "cache").rglob("*.bin")).stat().st_size == size - 4
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == list(range(7))


def test_a_folder_that_cannot_be_written_to_is_told_first(
    go: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("recipes.jobs.session.write_synced", refuse)
    ended = go()
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "Read-only file system" in ended.err and str(tmp_path / "outputs" / "run") in ended.err
    assert "mounted read-only" in ended.err
    # Nothing was tokenised, let alone trained.
    assert not (tmp_path / "cache").exists()


class _Disk:
    """Takes a part of the first write after it is full, as a disk does, and nothing then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._torn = False
        self._write = os.write
        monkeypatch.setattr("recipes.tracking.metrics_log.os.write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.full:
            return self._write(descriptor, data)
        if not self._torn:
            self._torn = True
            return self._write(descriptor, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, path = _Disk(monkeypatch), tmp_path / "metrics.jsonl"
    log = BufferedLog(path)
    for step in range(6):
        disk.full = 2 <= step < 5
        log.append({"stage": "moe", "step": step})
        log.sync()
        # What is there is whole at any time.
        assert [row["step"] for row in read_rows(path)] == list(range({2: 2, 3: 2, 4: 2}.get(step, step + 1)))
    log.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left on device" in said[0] and "Training goes on" in said[0]
    assert "the rows that have waited are written" in said[1]


def test_rows_that_are_never_written_are_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, path = _Disk(monkeypatch), tmp_path / "metrics.jsonl"
    monkeypatch.setattr("recipes.tracking.buffered_log.MOST_ROWS", 3)
    log = BufferedLog(path)
    log.append({"stage": "moe", "step": 0})
    disk.full = True
    for step in range(1, 4):
        log.append({"stage": "moe", "step": step})
    with pytest.raises(DiskError, match="No space left"):
        log.append({"stage": "moe", "step": 4})
    with pytest.raises(DiskError, match="No space left"):
        log.close()
    assert [row["step"] for row in read_rows(path)] == [0]


def test_a_file_that_vanished_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def work() -> int:
        return len((tmp_path / "gone.jsonl").read_text())

    assert launch._guarded(work) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'gone.jsonl'}: No such file or directory, in " in said
    assert "put it back" in said and "Traceback" not in said


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    def work() -> int:
        raise OSError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        launch._guarded(work)
