"""Checkpoints of one process: round trips, resharding, strictness, retention, space."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.errors import CheckpointError, ConfigError, DiskError, GraftError
from recipes.checkpoint import (
    LocalShard,
    checkpoint_bytes,
    find_checkpoint,
    load_checkpoint,
    require_space,
    save_checkpoint,
)
from recipes.checkpoint.manifest import FileRecord
from recipes.checkpoint.shard_layout import Box
from recipes.runtime.safetensors_codec import write_tensors


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    raw = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*raw)


def _awkward() -> dict[str, Tensor]:
    """One tensor of every kind that has ever broken a checkpoint format."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    floats = torch.tensor([math.nan, math.inf, -0.0, 1e-40])
    return {
        "matrix": torch.randn(5, 3),
        "bf16": torch.randn(7).bfloat16(),
        "half": torch.randn(3).half(),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "double": torch.randn(2, 1, 3).double(),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(2**40 + 1),
        "scalar": torch.tensor(1.25),
        "empty": torch.empty(0, 4),
        "special": floats,
        "transposed": base.t(),
        "strided": base[::2, 1:3],
        "shares_memory": base,
        "shares_memory_too": base.view(-1)[4:9],
        "weird name: \u00e9/../#0": torch.arange(3, dtype=torch.int32),
    }


def _blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Same shapes and dtypes, with other content that every byte must overwrite."""
    return {name: torch.full(value.shape, 1, dtype=value.dtype) for name, value in tensors.items()}


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = _awkward()
    state = {"step": 3, "data": {"epoch": 1, "order": [2, 0, 1]}, "best": math.inf}
    own = {"rng": torch.get_rng_state(), "nothing": torch.empty(0, dtype=torch.uint8)}
    path = save_checkpoint(tmp_path, 3, saved, state, own)
    assert path == tmp_path / "step-00000003"
    assert sorted(os.listdir(path)) == ["index.json", "manifest.json", "rank-00000.safetensors", "state.json"]
    assert os.listdir(tmp_path) == [path.name]

    filled = _blank(saved)
    loaded = load_checkpoint(path, filled)
    assert all(_same(saved[name], filled[name]) for name in saved)
    assert (loaded.step, loaded.world_size, loaded.state) == (3, 1, state)
    assert loaded.rank_tensors is not None and loaded.rank_tensors.keys() == own.keys()
    assert all(_same(own[name], loaded.rank_tensors[name]) for name in own)


def test_loading_fills_views_and_parameters_in_place(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4)
    path = save_checkpoint(tmp_path, 1, {"a": value, "b": value}, {})
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    memory = torch.zeros(4, 3)
    load_checkpoint(path, {"a": parameter, "b": memory.t()})
    assert torch.equal(parameter.detach(), value) and torch.equal(memory, value.t())


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    saved = {name: value for name, value in _awkward().items() if value.ndim}
    record = FileRecord.of(*write_tensors(tmp_path / "file.safetensors", list(saved.items())))
    assert record.size == (tmp_path / "file.safetensors").stat().st_size
    read = load_file(tmp_path / "file.safetensors")
    assert all(_same(saved[name], read[name]) for name in saved)


def test_nothing_at_all_can_be_saved(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, {}, {})
    assert load_checkpoint(path, {}).rank_tensors == {}


def test_overlap_by_hand() -> None:
    # Rows 2..5, columns 0..3 against rows 4..9, columns 2..3: rows 4..5, columns 2..3 are common.
    left, right = Box((2, 0), (4, 4)), Box((4, 2), (6, 2))
    common = left.overlap(right)
    assert common == Box((4, 2), (2, 2))
    assert common.within(left) == (slice(2, 4), slice(2, 4))
    assert common.within(right) == (slice(0, 2), slice(0, 2))
    assert left.overlap(Box((6, 0), (1, 4))) is None  # they only touch


def _parts(axis: int, cuts: list[int], whole: Tensor) -> dict[str, LocalShard]:
    """The loading side of a resharding: blank shards of ``whole``, cut along ``axis``."""
    sizes = [high - low for low, high in zip([0, *cuts], [*cuts, whole.shape[axis]], strict=True)]
    offsets = [0, *cuts]
    shards = {}
    for i, (block, start) in enumerate(zip(whole.split(sizes, axis), offsets, strict=True)):
        offset = tuple(start if d == axis else 0 for d in range(whole.ndim))
        shards[f"part{i}"] = LocalShard(torch.zeros_like(block), tuple(whole.shape), offset)
    return shards


@pytest.mark.parametrize(("axis", "cuts"), [(0, [1, 4]), (1, [2]), (2, [0, 3, 3]), (1, [1, 2, 3, 4])])
def test_any_block_can_be_read_from_a_whole_tensor(tmp_path: Path, axis: int, cuts: list[int]) -> None:
    whole = torch.randn(5, 6, 4)
    shards = _parts(axis, cuts, whole)
    path = save_checkpoint(tmp_path, 1, dict.fromkeys(shards, whole), {})
    load_checkpoint(path, shards)
    assert torch.equal(torch.cat([shard.tensor for shard in shards.values()], axis), whole)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, "1 tensors of this run are not in the checkpoint"),
        ({"a": torch.zeros(2)}, "='b': 1 tensors of the checkpoint are not in this run"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(2)},
            r"'a \(float32 \[2\], the run has float32 \[3\]\)': 1 tensors",
        ),
        ({"a": torch.zeros(2).double(), "b": torch.zeros(2)}, r"the run has float64 \[2\]"),
        ({"a": torch.zeros(2, 1), "b": torch.zeros(2)}, r"the run has float32 \[2, 1\]"),
    ],
)
def test_strictness_names_what_differs_and_overwrites_nothing(
    tmp_path: Path, wanted: dict[str, Tensor], message: str
) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2), "b": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, wanted)
    assert not any(value.any() for value in wanted.values())


def test_strictness_shows_a_few_names_and_counts_all(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {f"old{i}": torch.ones(1) for i in range(9)}, {})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, {f"new{i}": torch.ones(1) for i in range(3)})
    missing, unexpected = caught.value.mistakes
    assert (missing.value, missing.rule[:1]) == ("new0, new1, new2", "3")
    assert (unexpected.value, unexpected.rule[:1]) == ("old0, old1, old2, old3, old4 and 4 more", "9")


@pytest.mark.parametrize(
    ("tensors", "state", "error", "message"),
    [
        ({"z": torch.zeros(2, dtype=torch.complex64)}, {}, CheckpointError, "cannot hold tensors of"),
        ({}, {"losses": {3: 1.0}}, CheckpointError, r"state\.losses\[3\]"),
        ({}, {"model": object()}, GraftError, "not JSON serializable"),
        ({"s": LocalShard(torch.zeros(2), (4,), (3,))}, {}, CheckpointError, "does not fit a global tensor"),
        ({"s": LocalShard(torch.zeros(2), (4,), (0,))}, {}, CheckpointError, "hold 2 elements of it"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_disk_is_touched(
    tmp_path: Path, tensors: dict[str, Any], state: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "checkpoints", 1, tensors, state)
    assert not (tmp_path / "checkpoints").exists()


def test_retention_keeps_the_newest_and_the_one_just_written(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, {}, {}, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000030", "step-00000040"]
    save_checkpoint(tmp_path, 35, {}, {}, keep_last=1)  # after going back to step 30
    assert os.listdir(tmp_path) == ["step-00000035"]
    for step in (50, 60):
        save_checkpoint(tmp_path, step, {}, {})
    assert len(os.listdir(tmp_path)) == 3


def test_retention_leaves_alone_what_is_not_a_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "notes").mkdir()
    save_checkpoint(tmp_path, 10, {}, {}, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000001", "step-00000010"]
    with pytest.raises(ConfigError, match="keep_last=0"):
        save_checkpoint(tmp_path, 11, {}, {}, keep_last=0)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"a": torch.zeros(1)}, {})
    path = save_checkpoint(tmp_path, 10, {"a": torch.ones(1)}, {})
    value = torch.zeros(1)
    load_checkpoint(path, {"a": value})
    assert value == 1 and os.listdir(tmp_path) == [path.name]


def test_the_newest_step_is_found_whatever_the_number_of_digits(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none").path is None
    for step in (99_999_999, 100_000_000, 9):
        save_checkpoint(tmp_path, step, {}, {})
    assert find_checkpoint(tmp_path).path == tmp_path / "step-100000000"


def test_space_is_asked_for_before_the_run(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": LocalShard(torch.zeros(2).bfloat16(), (8,), (2,))}
    assert checkpoint_bytes(tensors) == 3 * 5 * 4 + 8 * 2
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(3, 5)}, {})
    require_space(path / "not" / "yet", 1000, "a checkpoint")
    with pytest.raises(DiskError, match=r"3 checkpoints needs 1024\.0 TiB, but only .* free on the disk of"):
        require_space(path / "not" / "yet", 2**50, "3 checkpoints")


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(3)}, {"x": 1})
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: record["size"] for name, record in manifest["files"].items()} == {
        name: (path / name).stat().st_size for name in os.listdir(path) if name != "manifest.json"
    }
