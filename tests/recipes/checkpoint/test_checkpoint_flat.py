"""Runs of flattened tensors: which boxes they are, and that checkpoints keep them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from moe.errors import CheckpointError
from recipes.checkpoint import FlatShard, checkpoint_bytes, load_checkpoint, save_checkpoint
from recipes.checkpoint.shard_layout import Box, flat_boxes, place
from tests.distributed_helper import run_ranks

SHAPES = [(), (7,), (3, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)]


def test_boxes_of_a_small_matrix() -> None:
    # Elements 1 to 9 of a 3 x 4 matrix: the end of row 0, row 1, and the first two of row 2.
    assert flat_boxes((3, 4), 1, 9) == [Box((0, 1), (1, 3)), Box((1, 0), (1, 4)), Box((2, 0), (1, 2))]
    # Inside of one row, and whole rows together.
    assert flat_boxes((3, 4), 5, 2) == [Box((1, 1), (1, 2))]
    assert flat_boxes((3, 4), 4, 8) == [Box((1, 0), (2, 4))]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_run_is_its_boxes_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2):
        boxes = flat_boxes(shape, start, stop - start)
        inside = [numbers[box.within(Box((0,) * len(shape), shape))].flatten() for box in boxes]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *inside]).tolist() == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert all(box.inside(shape) for box in boxes)


def test_a_run_that_does_not_fit_is_refused() -> None:
    for tensor, start in ((torch.zeros(5), 8), (torch.zeros(5), -1), (torch.zeros(2, 2), 0)):
        with pytest.raises(CheckpointError, match="does not fit a global tensor"):
            place("w", FlatShard(tensor, (3, 4), start))


def _cuts(size: int, world_size: int) -> list[int]:
    # Uneven, in the midst of rows, and nothing on the last rank but one.
    edges = [size * step // world_size + step % 3 for step in range(world_size)] + [size]
    edges[-2] = size
    return sorted(edges)


def _hold(shape: tuple[int, ...], rank: int, world_size: int) -> FlatShard:
    edges = _cuts(math.prod(shape), world_size)
    return FlatShard(torch.arange(edges[rank], edges[rank + 1]).float(), shape, edges[rank])


def save_and_load(rank: int, world_size: int, folder: str) -> tuple[bool, int]:
    """Saves runs, and reads them cut otherwise and whole."""
    wanted = {str(shape): _hold(shape, rank, world_size) for shape in SHAPES}
    path = save_checkpoint(folder, 1, wanted, {})
    whole = {str(shape): torch.zeros(shape) for shape in SHAPES}
    load_checkpoint(path, whole)
    equal = all(torch.equal(whole[str(s)], torch.arange(math.prod(s)).float().view(s)) for s in SHAPES)
    turned = {str(shape): _hold(shape, world_size - 1 - rank, world_size) for shape in SHAPES}
    for shard in turned.values():
        shard.tensor.fill_(-1)
    load_checkpoint(path, turned)
    for shape in SHAPES:
        expected = _hold(shape, world_size - 1 - rank, world_size)
        equal &= torch.equal(turned[str(shape)].tensor, expected.tensor)
    return equal, checkpoint_bytes(wanted)


@pytest.mark.distributed
def test_runs_are_saved_and_read_cut_otherwise(tmp_path: Path) -> None:
    size = 4 * sum(math.prod(shape) for shape in SHAPES)
    assert run_ranks(save_and_load, 3, str(tmp_path)) == [(True, size)] * 3
