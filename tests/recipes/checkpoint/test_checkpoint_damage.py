"""Damaged, unfinished and forged checkpoints: found out, named, passed over."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.errors import CheckpointError
from recipes.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from recipes.checkpoint.manifest import FileRecord, Index, Manifest, StoredBox, StoredTensor, rank_file
from recipes.runtime.safetensors_codec import write_tensors
from tests.paths import ROOT

_FILES = ["index.json", "manifest.json", "rank-00000.safetensors", "state.json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two complete checkpoints, steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.arange(100.0)}, {"step": step})
    return tmp_path


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _delete(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _link(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("damage", [_flip, _truncate, _delete, _empty])
def test_damage_is_named_and_passed_over(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    newest = root / "step-00000002"
    damage(newest / name)
    found = find_checkpoint(root)
    assert found.path == root / "step-00000001"
    [(rejected, reason)] = found.rejected
    assert rejected == newest and name in reason
    for use in (verify_checkpoint, lambda path: load_checkpoint(path, {"a": torch.zeros(100)})):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            use(newest)


def test_every_flipped_byte_of_every_file_is_noticed(root: Path) -> None:
    path = root / "step-00000002"
    for name in _FILES:
        data = (path / name).read_bytes()
        for i in range(0, len(data), 7):
            if data[i : i + 1].isspace():
                continue  # white space of the manifest carries no meaning
            (path / name).write_bytes(data[:i] + bytes([data[i] ^ 0x01]) + data[i + 1 :])
            with pytest.raises(CheckpointError):
                verify_checkpoint(path)
        (path / name).write_bytes(data)
    verify_checkpoint(path)


_SHARDS = ["rank-00000.safetensors", "rank-00001.safetensors"]
_OF_TWO = ["index.json", "manifest.json", "state.json", *_SHARDS]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete checkpoints, steps 1 and 2, of two ranks that each hold half of a tensor."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        _as_two_ranks(save_checkpoint(folder, step, {"a": torch.arange(4096.0)}, {"step": step}), step)
    return folder


def _as_two_ranks(path: Path, step: int) -> None:
    """Writes what two ranks would have written of a whole tensor."""
    halves = torch.arange(4096.0).chunk(2)
    records = {}
    for rank, half in enumerate(halves):
        (path / rank_file(rank)).unlink(missing_ok=True)
        records[rank_file(rank)] = FileRecord.of(
            *write_tensors(path / rank_file(rank), [("global/a#0", half)])
        )
    boxes = [StoredBox(rank=r, key="global/a#0", offset=(2048 * r,), size=(2048,)) for r in (0, 1)]
    index = Index(tensors={"a": StoredTensor(dtype="float32", shape=(4096,), boxes=boxes)})
    data = index.model_dump_json().encode()
    (path / "index.json").write_bytes(data)
    records |= {"index.json": FileRecord.of_bytes(data)}
    records |= {"state.json": FileRecord.of_bytes((path / "state.json").read_bytes())}
    (path / "manifest.json").write_text(Manifest.of(step, 2, records).model_dump_json())


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(share * (path.stat().st_size - 1)))


def _flip_at(share: float, bit: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)

    return flip


def _zeros_inside(path: Path) -> None:
    """A page that the disk has lost: the size is right, and what the page held is zeros."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + min(512, middle)] = bytes(min(512, middle))
    path.write_bytes(data)


def _of_the_other(path: Path) -> None:
    """A file that another save has left in the place of this one."""
    other = path.parent.parent / "step-00000001" / path.name
    data = bytearray(other.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": _delete,
    "empty": _empty,
    "one byte short": _truncate,
    "cut in half": _cut(0.5),
    "cut at the start": _cut(0.01),
    "first bit": _flip_at(0.0, 7),
    "bit in the middle": _flip_at(0.5, 1),
    "last bit": _flip_at(1.0, 3),
    "lost page": _zeros_inside,
    "of another save": _of_the_other,
}


@pytest.mark.parametrize("name", _OF_TWO)
@pytest.mark.parametrize("damage", _DAMAGES)
def test_fifty_damages(of_two_ranks: Path, tmp_path: Path, name: str, damage: str) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(of_two_ranks, root)
    whole = torch.zeros(4096)
    assert find_checkpoint(root).path == root / "step-00000002"
    _DAMAGES[damage](root / "step-00000002" / name)
    found = find_checkpoint(root)
    assert found.path == root / "step-00000001"
    [(rejected, reason)] = found.rejected
    assert rejected.name == "step-00000002" and name in reason
    load_checkpoint(found.path, {"a": whole})
    assert torch.equal(whole, torch.arange(4096.0))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


_ODD: dict[str, Callable[[Path], None]] = {
    "deep": lambda path: path.write_text("[" * 100_000),  # type: ignore[dict-item]
    "deep object": lambda path: path.write_text('{"a":' * 100_000),  # type: ignore[dict-item]
    "list": lambda path: path.write_text("[]"),  # type: ignore[dict-item]
    "null": lambda path: path.write_text("null"),  # type: ignore[dict-item]
    "zeros": lambda path: path.write_bytes(bytes(300)),  # type: ignore[dict-item]
    "long number": lambda path: path.write_text('{"step": ' + "9" * 9999 + "}"),  # type: ignore[dict-item]
    "pipe": _pipe,
    "folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "index.json"])
@pytest.mark.parametrize("odd", _ODD)
def test_odd_json_is_named_and_passed_over(root: Path, name: str, odd: str) -> None:
    _ODD[odd](root / "step-00000002" / name)
    found = find_checkpoint(root)
    assert found.path == root / "step-00000001"
    [(rejected, reason)] = found.rejected
    assert rejected.name == "step-00000002" and name in reason
    save_checkpoint(root, 3, {}, {}, keep_last=1)
    assert (root / "step-00000003").is_dir()


def test_several_damaged_files_are_reported_at_once(root: Path) -> None:
    path = root / "step-00000002"
    _flip(path / "state.json")
    _flip(path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(path)
    assert len(caught.value.mistakes) == 2


def test_nothing_is_found_when_all_are_damaged(root: Path) -> None:
    for path in list(root.iterdir()):
        _delete(path / "manifest.json")
    found = find_checkpoint(root)
    assert found.path is None and [path.name for path, _ in found.rejected] == [
        "step-00000002",
        "step-00000001",
    ]


def test_a_path_that_is_no_checkpoint(root: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        verify_checkpoint(root / "step-00000009")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(root)


def test_a_link_out_of_the_folder_is_refused(root: Path) -> None:
    _link(root / "step-00000002" / "state.json")
    with pytest.raises(CheckpointError, match="not a file of its own in the checkpoint's folder"):
        verify_checkpoint(root / "step-00000002")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/file", "..", "extra.json"])
def test_names_in_the_manifest_never_leave_the_folder(root: Path, name: str) -> None:
    path = root / "step-00000002"
    (root / "outside.safetensors").write_bytes(b"x")
    manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    files = {**manifest.files, name: FileRecord.of_bytes(b"x")}
    forged = Manifest.of(manifest.step, manifest.world_size, files)  # with a right checksum of its own
    (path / "manifest.json").write_text(forged.model_dump_json())
    with pytest.raises(CheckpointError, match="does not list the files of 1 ranks, and only those"):
        verify_checkpoint(path)


def _forge_index(path: Path, change: Callable[[dict], None]) -> None:
    """Changes the index, and makes the manifest agree."""
    index = json.loads((path / "index.json").read_bytes())
    change(index["tensors"]["a"])
    data = json.dumps(index).encode()
    (path / "index.json").write_bytes(data)
    manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    files = {**manifest.files, "index.json": FileRecord.of_bytes(data)}
    (path / "manifest.json").write_text(Manifest.of(2, 1, files).model_dump_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["boxes"][0].update(rank="../../outside"), r"tensors\.a\.boxes\.0\.rank"),
        (lambda entry: entry["boxes"][0].update(rank=-1), r"tensors\.a\.boxes\.0\.rank"),
        (lambda entry: entry["boxes"][0].update(rank=1), "names a rank, but there are only 1"),
        (lambda entry: entry["boxes"][0].update(offset=[1]), "leaves the shape"),
        (lambda entry: entry["boxes"][0].update(size=[99]), "hold 99 of 100 elements"),
        (lambda entry: entry["boxes"][0].update(size=[10, 10]), "leaves the shape"),
        (lambda entry: entry["boxes"].clear(), "hold 0 of 100 elements"),
        (lambda entry: entry["boxes"][0].update(key="global/b#0"), "global/b#0 cannot be read"),
        (
            lambda entry: (entry.update(shape=[50]), entry["boxes"][0].update(size=[50])),
            r"should have shape \(50,\)",
        ),
    ],
)
def test_a_forged_index_is_refused(root: Path, change: Callable[[dict], None], message: str) -> None:
    path = root / "step-00000002"
    _forge_index(path, change)
    length = 50 if "50" in message else 100
    wanted = torch.zeros(length)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, {"a": wanted})
    assert not wanted.any()


def test_a_newer_format_is_refused_by_version(root: Path) -> None:
    path = root / "step-00000002" / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "version": 3, "unknown": True}))
    with pytest.raises(CheckpointError, match="newer than version 2.*Update Graft"):
        verify_checkpoint(path.parent)


def test_moved_and_renamed_checkpoints_still_load(root: Path) -> None:
    moved = root / "kept for later"
    shutil.move(root / "step-00000002", moved)
    assert load_checkpoint(moved, {"a": torch.zeros(100)}).step == 2


_KILLED_SAVE = """
import signal, sys, torch
from recipes.checkpoint import save_checkpoint
from recipes.runtime import safetensors_codec
append = safetensors_codec.append
def slow(file, data, crc):
    crc = append(file, data, crc)
    file.flush()
    print("writing", flush=True)
    signal.pause()
    return crc
save_checkpoint(sys.argv[1], 1, {"a": torch.ones(4)}, {})
safetensors_codec.append = slow
save_checkpoint(sys.argv[1], 2, {"a": torch.zeros(4)}, {})
"""


def test_kill_in_the_middle_of_a_save_leaves_the_previous_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED_SAVE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    left = tmp_path / ".tmp-step-00000002"
    assert (left / "rank-00000.safetensors").stat().st_size > 0

    found = find_checkpoint(tmp_path)
    assert found.path == tmp_path / "step-00000001"
    assert found.rejected == [(left, "the save was interrupted before it was complete")]
    value = torch.zeros(4)
    load_checkpoint(found.path, {"a": value})
    assert torch.equal(value, torch.ones(4))

    save_checkpoint(tmp_path, 3, {}, {})
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]
