"""Checkpoints know their run and their step, whatever a folder is called."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from moe.errors import CheckpointError
from recipes.checkpoint import (
    Origin,
    Retention,
    find_checkpoint,
    load_checkpoint,
    own_checkpoints,
    retain,
    save_checkpoint,
    verify_checkpoint,
)
from recipes.checkpoint.manifest import parse_manifest


def save(root: Path, step: int, run: str | None = "mine", keep_last: int | None = None) -> Path:
    """A checkpoint whose one tensor is its step."""
    tensors = {"a": torch.full((3,), float(step))}
    return save_checkpoint(root, step, tensors, {}, keep_last=keep_last, origin=Origin(run, "mine/step-1"))


def as_of_before(folder: Path) -> None:
    """Rewrites a manifest as version 1, which knew no runs."""
    path = folder / "manifest.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("run", "parent", "checksum")}
    old["version"] = 1
    checksum = f"{zlib.crc32(json.dumps(old, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps(old | {"checksum": checksum}))


def test_the_manifest_has_run_and_parent(tmp_path: Path) -> None:
    manifest = parse_manifest(save(tmp_path, 4))
    assert (manifest.run, manifest.parent, manifest.step) == ("mine", "mine/step-1", 4)
    assert load_checkpoint(tmp_path / "step-00000004", {"a": torch.zeros(3)}).run == "mine"


def test_a_copy_under_a_higher_name_is_named_and_stays(tmp_path: Path) -> None:
    for step in (4, 8):
        save(tmp_path, step)
    stray = tmp_path / "step-00000099"
    shutil.copytree(tmp_path / "step-00000004", stray)
    found = find_checkpoint(tmp_path, run="mine")
    assert found.path == tmp_path / "step-00000008"
    reason = "manifest.json: is of another step than step-00000099 (it is of step 4)"
    assert found.lines() == [f"passing over the checkpoint {stray}: {reason}"]
    save(tmp_path, 12, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000008", "step-00000012", "step-00000099"]
    with pytest.raises(CheckpointError, match="Name the folder step-00000004, or remove it"):
        verify_checkpoint(stray)


def test_a_checkpoint_of_another_run_is_named_and_kept(tmp_path: Path) -> None:
    save(tmp_path, 4)
    foreign = save(tmp_path, 8, run="theirs")
    found = find_checkpoint(tmp_path, run="mine")
    assert found.path == tmp_path / "step-00000004"
    [(path, reason)] = found.rejected
    assert path == foreign and "belongs to another run than this, mine (it is of run theirs)" in reason
    assert find_checkpoint(tmp_path).path == foreign  # who does not say which run takes any
    save(tmp_path, 12, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["step-00000008", "step-00000012"]
    # The run comes to that step itself: what lies there is not overwritten.
    save(tmp_path, 8)
    [aside] = [path for path in tmp_path.iterdir() if path.name.startswith("foreign-step-00000008-")]
    assert parse_manifest(aside).run == "theirs" and parse_manifest(foreign).run == "mine"
    assert own_checkpoints(tmp_path, "mine") == [tmp_path / "step-00000012", tmp_path / "step-00000008"]


def test_checkpoints_of_before_are_everybody_s(tmp_path: Path) -> None:
    for step in (4, 8):
        as_of_before(save(tmp_path, step))
    assert find_checkpoint(tmp_path, run="mine") == find_checkpoint(tmp_path)
    value = torch.zeros(3)
    assert load_checkpoint(tmp_path / "step-00000008", {"a": value}).run is None and value[0] == 8
    save(tmp_path, 12, keep_last=1)
    assert os.listdir(tmp_path) == ["step-00000012"]


def test_a_manifest_of_now_cannot_be_passed_off_as_one_of_before(tmp_path: Path) -> None:
    path = save(tmp_path, 4) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "theirs"}))
    with pytest.raises(CheckpointError, match="its own checksum should be"):
        verify_checkpoint(path.parent)


def test_retention_deletes_nothing_that_it_cannot_read(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000001" / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    retain(tmp_path, tmp_path / "step-00000004", Retention(last=1), "mine")
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002", "step-00000004"]
