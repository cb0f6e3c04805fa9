"""Decides which rank writes which box: from what every rank holds, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe.errors import CheckpointError, Mistake
from recipes.checkpoint.manifest import Index, StoredBox, StoredTensor
from recipes.checkpoint.shard_layout import Placed, cover_fault
from recipes.checkpoint.stream import require_storable

_NAMES_SHOWN = 5


def describe(placed: Mapping[str, Placed]) -> dict[str, Any]:
    """What this rank holds, as JSON: name -> [dtype, shape, [[offset, size] of each piece]]."""
    described = {}
    for name, held in placed.items():
        require_storable(name, held.dtype)
        boxes = [[list(piece.box.offset), list(piece.box.size)] for piece in held.pieces]
        described[name] = [str(held.dtype).removeprefix("torch."), list(held.shape), boxes]
    return described


def plan(described: Sequence[Mapping[str, Any]]) -> Index:
    """Decides who writes what. Every rank decides the same from the same descriptions.

    Raises:
        CheckpointError: The ranks contradict each other, or nobody holds some part of a tensor.
    """
    mistakes = _disagreements(described)
    held: dict[str, tuple[str, list[int], dict[str, StoredBox]]] = {}
    for rank, description in enumerate(described):
        for name, (dtype, shape, boxes) in description["tensors"].items():
            first_dtype, first_shape, stored = held.setdefault(name, (dtype, shape, {}))
            if (first_dtype, first_shape) != (dtype, shape):
                rule = f"rank {rank} holds another tensor of that name: {dtype} {shape}"
                mistakes.append(
                    Mistake(name, f"{first_dtype} {first_shape}", rule, "Give it a name of its own.")
                )
            for i, (offset, size) in enumerate(boxes):
                box = StoredBox(rank=rank, key=f"global/{name}#{i}", offset=tuple(offset), size=tuple(size))
                stored.setdefault(str((offset, size)), box)
    tensors = {}
    for name, (dtype, shape, stored) in held.items():
        try:
            tensors[name] = StoredTensor(dtype=dtype, shape=tuple(shape), boxes=list(stored.values()))
        except ValueError:
            boxes = [box.box for box in stored.values()]
            elements, fault = sum(box.numel for box in boxes), cover_fault(tuple(shape), boxes)
            rule = (
                f"the ranks together hold {elements} elements of it, which do not make up this shape: "
                f"{fault or 'a box leaves it'} (of a stack of experts, a row is an expert)"
            )
            mistakes.append(Mistake(name, shape, rule, "Pass the shards of all ranks, without overlaps."))
    if mistakes:
        raise CheckpointError(mistakes[: 2 * _NAMES_SHOWN])
    return Index(tensors=tensors)


def _disagreements(described: Sequence[Mapping[str, Any]]) -> list[Mistake]:
    """What must be the same on all ranks and is not."""
    mistakes = []
    for field in ("step", "state"):
        odd = [rank for rank, other in enumerate(described) if other[field] != described[0][field]]
        if odd:
            rule = f"the {field} differs from that of rank 0"
            remedy = f"Give every rank the same {field}; what differs belongs into rank_tensors."
            mistakes.append(Mistake("ranks", odd[:_NAMES_SHOWN], rule, remedy))
    return mistakes
