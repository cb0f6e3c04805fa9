"""Files that are there in full or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from moe.errors import DiskError
from recipes.runtime.atomic import atomic_write_json, atomic_write_text


def test_text_and_json_replace_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "summary.json"
    atomic_write_text(target, "old")
    atomic_write_json(target, {"loss": 1.5})
    assert json.loads(target.read_text()) == {"loss": 1.5}
    assert os.listdir(target.parent) == ["summary.json"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"a\.txt='No space left on device'.*Free some space"):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_not_json_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        atomic_write_json(tmp_path / "a.json", {"x": object()})
    assert os.listdir(tmp_path) == []


def test_an_unwritable_place_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        atomic_write_text(tmp_path / "file" / "a.txt", "x")
