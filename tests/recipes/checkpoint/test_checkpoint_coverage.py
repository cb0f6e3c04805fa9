"""Every expert is accounted for: a checkpoint in which one is missing or doubled is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import CheckpointError
from recipes.checkpoint import LocalShard, load_checkpoint, save_checkpoint
from recipes.checkpoint.manifest import INDEX, MANIFEST, FileRecord, Index, Manifest, StoredBox
from recipes.checkpoint.shard_layout import Box, cover_fault
from recipes.checkpoint.writer import plan_writes

NAME = "model.layers.3.mlp.experts.w_up_EUD"
SHAPE = (4, 2, 3)


def _held(*experts: tuple[int, int]) -> dict[str, Any]:
    """What a rank says that holds the experts ``first ... first + count - 1``."""
    boxes = [[[first, 0, 0], [count, *SHAPE[1:]]] for first, count in experts]
    return {"step": 1, "state": 0, "tensors": {NAME: ["float32", list(SHAPE), boxes]}}


def test_every_expert_on_two_ranks() -> None:
    boxes = plan_writes([_held((0, 2)), _held((2, 2))]).tensors[NAME].boxes
    assert [(box.rank, box.offset[0], box.size[0]) for box in boxes] == [(0, 0, 2), (1, 2, 2)]
    # Replicas are one: what several ranks hold alike is written once.
    assert (
        plan_writes([_held((0, 2)), _held((0, 2)), _held((2, 2)), _held((2, 2))]).tensors[NAME].boxes[1].rank
        == 2
    )


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([_held((0, 2)), _held((3, 1))], "row 2 is missing"),
        ([_held((0, 2)), _held((0, 2))], "rows 2, 3 are missing"),
        ([_held((0, 3)), _held((2, 2))], "row 2 is held twice"),
        # As many elements as there should be: expert 1 twice and expert 3 never.
        ([_held((0, 2)), _held((1, 1), (2, 1))], "row 3 is missing and row 1 is held twice"),
        ([_held()], "rows 0, 1, 2, 3 are missing"),
    ],
)
def test_missing_and_doubled_experts_are_not_saved(ranks: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{re.escape(NAME)}=.*{told}.*a row is an expert"):
        plan_writes(ranks)


def test_a_rank_that_saves_too_few_experts_is_refused(tmp_path: Path) -> None:
    shard = LocalShard(torch.zeros(3, 2, 3), SHAPE, (0, 0, 0))
    with pytest.raises(CheckpointError, match=rf"{re.escape(NAME)}=.*row 3 is missing"):
        save_checkpoint(tmp_path, 1, {NAME: shard}, {})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_an_expert_is_not_loaded(tmp_path: Path) -> None:
    tensors = {NAME: torch.arange(24.0).view(SHAPE), "b": torch.ones(())}
    folder = save_checkpoint(tmp_path, 1, tensors, {})
    content = json.loads((folder / INDEX).read_text())
    box = content["tensors"][NAME]["boxes"][0]
    halves = [box | {"offset": [start, 0, 0], "size": [2, 2, 3]} for start in (0, 1)]
    for boxes, told in ((halves, "row 3 is missing and row 1 is held twice"), ([], "rows 0, 1, 2, 3 are")):
        content["tensors"][NAME]["boxes"] = boxes
        data = json.dumps(content).encode()
        (folder / INDEX).write_bytes(data)
        # The checksums are those of what is wrong: what it says is looked at as well.
        records = {name: FileRecord(**record) for name, record in manifest_of(folder)["files"].items()}
        manifest = Manifest.of(1, 1, records | {INDEX: FileRecord.of_bytes(data)})
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        with pytest.raises(CheckpointError, match=rf"{re.escape(NAME)}.*{told}"):
            load_checkpoint(folder, tensors)


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def test_an_expert_cut_over_ranks_is_whole_only_with_all_of_them() -> None:
    # Two experts of [4, 1]; each cut in two by its rows.
    halves = [Box((e, half, 0), (1, 2, 1)) for e in (0, 1) for half in (0, 2)]
    assert cover_fault((2, 4, 1), halves) is None
    assert cover_fault((2, 4, 1), halves[:-1]) == "row 1 is missing"
    assert cover_fault((2, 4, 1), [*halves, halves[0]]) == "row 0 is held twice"
    assert cover_fault((), [Box((), ())]) is None
    assert cover_fault((), []) == "row 0 is missing"
    assert cover_fault((0, 3), []) is None
    many = cover_fault((20,), [])
    assert many == "rows 0, 1, 2, 3, 4, 5, 6, 7, ... are missing"


def test_stored_boxes_must_lie_inside() -> None:
    box = StoredBox(rank=0, key="k", offset=(3,), size=(2,))
    with pytest.raises(ValueError, match="leaves the shape"):
        Index.model_validate({"tensors": {"a": {"dtype": "float32", "shape": (4,), "boxes": [box]}}})
