"""Saves a checkpoint: plans which rank writes which box, writes a file per rank, publishes all or nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe.errors import CheckpointError, DiskError, GraftError, Mistake
from recipes.checkpoint.inventory import Retention, is_own, retain
from recipes.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    STATE,
    TEMPORARY,
    FileRecord,
    Index,
    Manifest,
    Origin,
    StoredBox,
    StoredTensor,
    parse_manifest,
    rank_file,
    step_name,
)
from recipes.checkpoint.shard_layout import GlobalTensor, Placed, cover_fault, place
from recipes.runtime.atomic import fsync_folder, replace_folder, write_synced
from recipes.runtime.ranks import Ranks
from recipes.runtime.safetensors_codec import CODES, write_tensors

_LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class PreparedSave:
    """A save that all ranks have agreed on, and whose temporary folder exists.

    Attributes:
        ranks: The ranks that take part.
        root: The folder of the checkpoints.
        step: Optimizer steps done.
        index: All global tensors, and which rank writes which box.
        entries: Keys and tensors that this rank writes; the tensors are live until they are written or
            copied.
        state_json: The caller's state.
        keep: Rule by which older checkpoints are kept.
        origin: Its run, and what that went on from.
    """

    ranks: Ranks
    root: Path
    step: int
    index: Index
    entries: Sequence[tuple[str, Tensor]]
    state_json: bytes
    keep: Retention
    origin: Origin

    @property
    def final(self) -> Path:
        """The checkpoint's folder once it is complete."""
        return self.root / step_name(self.step)

    @property
    def temporary(self) -> Path:
        """The folder that it is written in."""
        return self.root / (TEMPORARY + step_name(self.step))

    def write(self, entries: Sequence[tuple[str, Tensor]] | None = None) -> FileRecord:
        """Writes this rank's file, without communication.

        Args:
            entries: Copies of the attribute `entries`; None writes the live tensors.

        Raises:
            OSError: As the operating system raised it.
        """
        path = self.temporary / rank_file(self.ranks.rank)
        return FileRecord.of(*write_tensors(path, self.entries if entries is None else entries))

    def publish(self, written: Sequence[Mapping[str, Any]]) -> None:
        """Makes the checkpoint visible, then deletes older ones that are not kept. Only rank 0 calls it.

        Args:
            written: The record that `write` returned on each rank, dumped.

        Raises:
            OSError: As the operating system raised it.
            DiskError: Rank 0 does not see what another rank has written.
        """
        records = {rank_file(rank): FileRecord(**record) for rank, record in enumerate(written)}
        for name, data in ((INDEX, self.index.model_dump_json().encode()), (STATE, self.state_json)):
            write_synced(self.temporary / name, data)
            records[name] = FileRecord.of_bytes(data)
        for name, record in records.items():
            path = self.temporary / name
            size = path.stat().st_size if path.exists() else 0
            if size != record.size:
                rule = f"rank 0 sees {size} of the {record.size} bytes that were written"
                remedy = "Use a folder on a disk that all machines share."
                raise DiskError.one("file", str(path), rule, remedy)
        # The manifest comes last: it makes the folder a checkpoint.
        manifest = Manifest.of(self.step, self.ranks.size, records, self.origin)
        write_synced(self.temporary / MANIFEST, manifest.model_dump_json(indent=1).encode())
        fsync_folder(self.temporary)
        self._set_aside_foreign()
        replace_folder(self.temporary, self.final, self.root / f"{TEMPORARY}replaced-{self.final.name}")
        retain(self.root, self.final, self.keep, self.origin.run)

    def _set_aside_foreign(self) -> None:
        """Renames a folder that has the checkpoint's name and is another's."""
        with contextlib.suppress(CheckpointError):  # damaged, or not there: nobody can use it
            parse_manifest(self.final)
            if not is_own(self.final, self.origin.run):
                aside = self.root / f"foreign-{self.final.name}-{uuid.uuid4().hex[:8]}"
                self.final.rename(aside)
                _LOG.warning("%s is not of this run, and is now %s", self.final, aside.name)

    def discard(self) -> None:
        """Removes what was written; the next save removes any rest. Only rank 0 calls it."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, GlobalTensor],
    state: Mapping[str, Any],
    rank_tensors: Mapping[str, Tensor] | None = None,
    *,
    keep_last: int | None = None,
    origin: Origin | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes ``root/step-<step>``, or nothing. Collective.

    A box that several ranks hold (plain tensors, replicated axes) is written once, by the lowest of them. A
    checkpoint of the same step is replaced. Unfinished saves of killed runs are removed first.

    Args:
        root: The run's ``checkpoints`` folder, on a file system that all ranks see; made if missing.
        step: Optimizer steps done.
        tensors: Global name -> tensor. Ranks may hold different names, as pipeline stages do.
        state: JSON-able, keys are strings, the same on all ranks. Tuples come back as lists.
        rank_tensors: Tensors that belong to this rank only, such as random-number states.
        keep_last: Keep this checkpoint and the ``keep_last - 1`` others of the highest steps; None keeps all.
        origin: The run, and what it went on from; None for none.
        group: The ranks that take part; None is all of them, or this process alone.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: At least one rank could not write. Raised on all ranks; older checkpoints remain.
        CheckpointError: The ranks disagree about a tensor or the state, or pieces of a tensor are missing.
        ConfigError: ``keep_last`` is below one.
        GraftError: A rank failed in another way.
    """
    keep = Retention(keep_last)
    save = prepare_save(
        Path(root), step, tensors, state, rank_tensors or {}, keep, origin or Origin(), Ranks(group)
    )
    return write_and_publish(save)


def prepare_save(
    root: Path,
    step: int,
    tensors: Mapping[str, GlobalTensor],
    state: Mapping[str, Any],
    rank_tensors: Mapping[str, Tensor],
    keep: Retention,
    origin: Origin,
    ranks: Ranks,
) -> PreparedSave:
    """Plans the writes and makes the temporary folder. Collective; see `save_checkpoint`."""
    assert step >= 0, f"a checkpoint of step {step}"
    placed: dict[str, Placed] = {}
    state_json = bytearray()

    def describe() -> dict[str, Any]:
        placed.update((name, place(name, value)) for name, value in tensors.items())
        state_json.extend(_state_json(state))
        return {"step": step, "state": zlib.crc32(state_json), "tensors": _describe(placed)}

    index = plan_writes(ranks.together(f"preparing {root / step_name(step)}", describe))
    entries = _entries(index, ranks.rank, placed, rank_tensors)
    save = PreparedSave(ranks, root, step, index, entries, bytes(state_json), keep, origin)
    made = save.temporary
    ranks.together(f"making {made}", lambda: _make(root, made) if ranks.is_rank0 else None)
    return save


def write_and_publish(save: PreparedSave) -> Path:
    """Writes and publishes while all ranks wait. Collective; see `save_checkpoint`."""
    ranks = save.ranks
    try:
        written = ranks.together(f"writing {save.temporary}", lambda: save.write().model_dump())
        ranks.together(f"publishing {save.final}", lambda: save.publish(written) if ranks.is_rank0 else None)
    except GraftError:
        ranks.together(f"removing {save.temporary}", lambda: save.discard() if ranks.is_rank0 else None)
        raise
    return save.final


def _state_json(state: Mapping[str, Any]) -> bytes:
    """Encodes the state; rejects keys that JSON would silently turn into strings."""
    odd = _other_keys(state, "state")
    if odd:
        rule = "JSON keys are strings, these would come back as another type"
        raise CheckpointError.one("state", odd[:_NAMES_SHOWN], rule, "Use string keys.")
    return json.dumps(dict(state)).encode()


def _other_keys(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping):
        odd = [f"{where}[{key!r}]" for key in value if not isinstance(key, str)]
        return odd + [found for key, inner in value.items() for found in _other_keys(inner, f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [found for i, inner in enumerate(value) for found in _other_keys(inner, f"{where}[{i}]")]
    return []


def _make(root: Path, temporary: Path) -> None:
    """Removes unfinished saves of killed runs, and makes the temporary folder."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(TEMPORARY + "*"):
        _LOG.info("removing the unfinished save %s", left)
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    temporary.mkdir()


def _entries(
    index: Index, rank: int, placed: Mapping[str, Placed], own: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Lists keys and tensors that this rank writes: the boxes it owns, and its own tensors."""
    entries = [(f"rank/{name}", tensor) for name, tensor in own.items()]
    for name, held in placed.items():
        keys = {stored.key for stored in index.tensors[name].boxes if stored.rank == rank}
        pieces = ((f"global/{name}#{i}", piece.tensor) for i, piece in enumerate(held.pieces))
        entries += [(key, tensor) for key, tensor in pieces if key in keys]
    return entries


def _describe(placed: Mapping[str, Placed]) -> dict[str, Any]:
    """Describes what this rank holds, as JSON: name -> [dtype, shape, [[offset, size] of each piece]].

    Raises:
        CheckpointError: The file format has no code for a dtype.
    """
    described = {}
    for name, held in placed.items():
        if held.dtype not in CODES:
            rule = f"a checkpoint cannot hold tensors of {held.dtype}"
            raise CheckpointError.one(name, str(held.dtype), rule, "Convert it, or view it as uint8.")
        boxes = [[list(piece.box.offset), list(piece.box.size)] for piece in held.pieces]
        described[name] = [str(held.dtype).removeprefix("torch."), list(held.shape), boxes]
    return described


def plan_writes(described: Sequence[Mapping[str, Any]]) -> Index:
    """Decides which rank writes which box. Every rank decides the same from the same descriptions.

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
    """Finds values that must be the same on all ranks and are not."""
    mistakes = []
    for field in ("step", "state"):
        odd = [rank for rank, other in enumerate(described) if other[field] != described[0][field]]
        if odd:
            rule = f"the {field} differs from that of rank 0"
            remedy = f"Give every rank the same {field}; what differs belongs in rank_tensors."
            mistakes.append(Mistake("ranks", odd[:_NAMES_SHOWN], rule, remedy))
    return mistakes
