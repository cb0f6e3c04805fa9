"""Layout of sharded tensors: the boxes of the global tensor that a rank holds.

A *box* is an axis-aligned block of a global tensor. A rank holds a list of *pieces* of a tensor: boxes, each
with a view of the local memory. The rest of this package is written in these terms, so that it does not
depend on FSDP, expert parallelism or any engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from moe.errors import CheckpointError

_ROWS_SHOWN = 8


@dataclass(frozen=True)
class Box:
    """A block of a global tensor: the elements ``offset[d] <= i < offset[d] + size[d]`` of each axis d."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; one for a tensor without axes."""
        return math.prod(self.size)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Returns True if it lies inside a tensor of ``shape``."""
        if not len(self.offset) == len(self.size) == len(shape):
            return False
        axes = zip(self.offset, self.size, shape, strict=True)
        return all(0 <= start <= start + length <= total for start, length, total in axes)

    def overlap(self, other: Box) -> Box | None:
        """Returns the box of elements that are in both boxes, or None if there are none."""
        axes = list(zip(self.offset, self.size, other.offset, other.size, strict=True))
        low = tuple(max(mine, its) for mine, _, its, _ in axes)
        high = tuple(min(mine + length, its + width) for mine, length, its, width in axes)
        size = tuple(stop - start for start, stop in zip(low, high, strict=True))
        return None if any(length <= 0 for length in size) else Box(low, size)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Returns slices that cut this box out of a tensor that holds ``outer``."""
        starts = (mine - its for mine, its in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, self.size, strict=True))


def cover_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Finds rows of the first axis that the boxes leave out or hold twice; in a stack, a row is an expert.

    Args:
        shape: Shape of a global tensor.
        boxes: Boxes inside it.

    Returns:
        A clause such as "rows 1, 2 are missing and row 0 is held twice"; None if every row is held once.
    """
    changes = [0] * ((shape[0] if shape else 1) + 1)
    for box in boxes:
        start, length = (box.offset[0], box.size[0]) if shape else (0, 1)
        changes[start] += box.numel // length
        changes[start + length] -= box.numel // length
    wanted, held = math.prod(shape[1:]), list(itertools.accumulate(changes[:-1]))
    faults = [
        (what, [str(row) for row, count in enumerate(held) if wrong(count)])
        for what, wrong in (("missing", wanted.__gt__), ("held twice", wanted.__lt__))
    ]
    clauses = [
        f"{'row' if len(rows) == 1 else 'rows'} {', '.join(rows[:_ROWS_SHOWN])}"
        f"{', ...' * (len(rows) > _ROWS_SHOWN)} {'is' if len(rows) == 1 else 'are'} {what}"
        for what, rows in faults
        if rows
    ]
    return " and ".join(clauses) or None


@dataclass(frozen=True, eq=False)
class LocalShard:
    """A block of a global tensor that an engine shards itself, without DTensor.

    Attributes:
        tensor: The local block. It is read on save and overwritten on load.
        global_shape: Shape of the global tensor.
        offset: Index of the block's first element in the global tensor.
    """

    tensor: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FlatShard:
    """A run of a global tensor's elements in row-major order, for engines that shard flattened tensors.

    Attributes:
        tensor: ``[N]`` elements. They are read on save and overwritten on load. N may be 0.
        global_shape: Shape of the global tensor.
        start: Index of the first element in the flattened global tensor.
    """

    tensor: Tensor
    global_shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, eq=False)
class LocalBlocks:
    """Several blocks of a global tensor, for engines that store several tensors in one.

    Attributes:
        global_shape: Shape of the global tensor.
        blocks: The blocks that this rank holds, at least one. A block that occurs several times is written
            once and read into each.
    """

    global_shape: tuple[int, ...]
    blocks: tuple[LocalShard, ...]


GlobalTensor: TypeAlias = Tensor | LocalShard | FlatShard | LocalBlocks
"""A plain tensor is replicated (all ranks hold the same); a DTensor and the shards state what they hold."""


def local_memory(value: GlobalTensor) -> list[Tensor]:
    """Returns the local tensors of a global tensor, not copied."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if isinstance(value, LocalBlocks):
        return [block.tensor for block in value.blocks]
    return [value.tensor if isinstance(value, LocalShard | FlatShard) else value]


def global_shape(value: GlobalTensor) -> tuple[int, ...]:
    """Returns the shape of the whole tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else value.global_shape


@dataclass(frozen=True, eq=False)
class Piece:
    """One box that this rank holds, and a view of the memory that holds it."""

    box: Box
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Placed:
    """Local pieces of one global tensor: any number of non-empty ones, or none."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of one axis, where they start locally and globally."""

    local: int
    start: int
    length: int


def place(name: str, value: GlobalTensor) -> Placed:
    """Finds the boxes of the global tensor that ``value`` holds on this rank.

    Args:
        name: Global name, for the error message.
        value: A plain tensor, a DTensor or a shard.

    Raises:
        CheckpointError: A DTensor awaits a reduction, or a shard does not fit its global shape.
    """
    if isinstance(value, DTensor):
        return _place_dtensor(name, value)
    if isinstance(value, LocalShard):
        return _place_shard(name, value)
    if isinstance(value, FlatShard):
        return _place_flat(name, value)
    if isinstance(value, LocalBlocks):
        pieces = tuple(piece for block in value.blocks for piece in _place_shard(name, block).pieces)
        return Placed(value.blocks[0].tensor.dtype, tuple(value.global_shape), pieces)
    shape = tuple(value.shape)
    return Placed(value.dtype, shape, _cut(value.detach(), [[_Run(0, 0, length)] for length in shape]))


def _place_shard(name: str, value: LocalShard) -> Placed:
    size, shape = tuple(value.tensor.shape), tuple(value.global_shape)
    if not Box(tuple(value.offset), size).inside(shape):
        rule = f"a shard at {value.offset} does not fit a global tensor of shape {shape}"
        raise CheckpointError.one(name, size, rule, "Give the block's offset in the global tensor.")
    runs = [[_Run(0, start, length)] for start, length in zip(value.offset, size, strict=True)]
    return Placed(value.tensor.dtype, shape, _cut(value.tensor.detach(), runs))


def _place_flat(name: str, value: FlatShard) -> Placed:
    shape, count = tuple(value.global_shape), value.tensor.numel()
    if value.tensor.ndim != 1 or not 0 <= value.start <= value.start + count <= math.prod(shape):
        rule = f"a run from element {value.start} on does not fit a global tensor of shape {shape}"
        remedy = "Give its start in the flattened global tensor."
        raise CheckpointError.one(name, tuple(value.tensor.shape), rule, remedy)
    pieces, done = [], 0
    for box in flat_boxes(shape, value.start, count):
        part = value.tensor.detach()[done : done + box.numel]
        pieces.append(Piece(box, part.view(box.size)))
        done += box.numel
    return Placed(value.tensor.dtype, shape, tuple(pieces))


def flat_boxes(shape: tuple[int, ...], start: int, count: int) -> list[Box]:
    """Splits a run of elements into boxes, in the order of the elements: at most 2n - 1 for n axes.

    Args:
        shape: Shape of a tensor in row-major order.
        start: First element of the run.
        count: Number of elements of the run, all inside the tensor.
    """
    if count == 0:
        return []
    if len(shape) < 2:
        return [Box((start,) if shape else (), (count,) if shape else ())]
    row = math.prod(shape[1:])
    first, inside = divmod(start, row)
    boxes = []
    if inside or count < row:
        head = min(count, row - inside)
        boxes += _in_row(first, shape, inside, head)
        first, count = first + 1, count - head
    whole, rest = divmod(count, row)
    if whole:
        boxes.append(Box((first, *[0] * len(shape[1:])), (whole, *shape[1:])))
    return boxes + _in_row(first + whole, shape, 0, rest)


def _in_row(row: int, shape: tuple[int, ...], start: int, count: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.size)) for box in flat_boxes(shape[1:], start, count)]


def _place_dtensor(name: str, value: DTensor) -> Placed:
    if any(isinstance(placement, Partial) for placement in value.placements):
        rule = "a DTensor that still awaits a reduction across ranks cannot be saved or filled"
        raise CheckpointError.one(
            name, value.placements, rule, "Redistribute it to Shard or Replicate first."
        )
    shape = tuple(value.shape)
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return Placed(value.dtype, shape, ())
    if any(isinstance(placement, _StridedShard) for placement in value.placements):
        runs = [_strided_runs(axis, value, coordinate) for axis in range(len(shape))]
    else:
        size, offset = compute_local_shape_and_global_offset(shape, value.device_mesh, value.placements)
        runs = [[_Run(0, start, length)] for start, length in zip(offset, size, strict=True)]
    with torch.no_grad():
        local = value.to_local()
    held = tuple(sum(run.length for run in axis) for axis in runs)
    if tuple(local.shape) != held:
        rule = f"its placements {value.placements} promise a local shape of {held}"
        raise CheckpointError.one(name, tuple(local.shape), rule, "Pass it as a LocalShard with its offset.")
    return Placed(value.dtype, shape, _cut(local, runs))


def _strided_runs(axis: int, value: DTensor, coordinate: Sequence[int]) -> list[_Run]:
    """Finds the rows of ``axis`` that this rank holds if FSDP shards what TP or EP has sharded already.

    ``_StridedShard(split_factor)`` means that the axis was already cut into ``split_factor`` parts and each
    part is cut again, so that a rank may hold several separate runs. The definition is applied to row
    numbers.
    """
    rows = torch.arange(value.shape[axis])
    for mesh_axis, placement in enumerate(value.placements):
        if not isinstance(placement, Shard | _StridedShard) or placement.dim != axis:
            continue
        count, mine = value.device_mesh.size(mesh_axis), coordinate[mesh_axis]
        if isinstance(placement, _StridedShard):
            factor = int(placement.split_factor)
            parts = (_chunk(rows, factor, part) for part in range(factor))
            rows = torch.cat([_chunk(part, count, mine) for part in parts])
        else:
            rows = _chunk(rows, count, mine)
    if len(rows) == 0:
        return [_Run(0, 0, 0)]
    breaks = (torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist()
    edges = [0, *breaks, len(rows)]
    return [_Run(low, int(rows[low]), high - low) for low, high in itertools.pairwise(edges)]


def _chunk(rows: Tensor, count: int, index: int) -> Tensor:
    """Returns part ``index`` of ``count`` as torch.chunk cuts them, empty where it would give fewer parts."""
    size = -(-len(rows) // count)
    return rows[index * size : (index + 1) * size]


def _cut(local: Tensor, runs: Sequence[Sequence[_Run]]) -> tuple[Piece, ...]:
    """Makes one piece for each combination of the axes' runs, without empty ones."""
    pieces = []
    for combination in itertools.product(*runs):
        box = Box(tuple(run.start for run in combination), tuple(run.length for run in combination))
        view = local[tuple(slice(run.local, run.local + run.length) for run in combination)]
        if box.numel:
            pieces.append(Piece(box, view))
    return tuple(pieces)
