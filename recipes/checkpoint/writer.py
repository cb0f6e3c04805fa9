"""Saves a checkpoint: every rank its own file, all or nothing, then deletes what is too old."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe.errors import CheckpointError, DiskError, GraftError
from recipes.checkpoint.manifest import FileRecord, Index, Manifest
from recipes.checkpoint.names import INDEX, MANIFEST, STATE, TEMPORARY, rank_file, step_name
from recipes.checkpoint.retention import Retention, retain
from recipes.checkpoint.shard_layout import GlobalTensor, Placed, place
from recipes.checkpoint.stream import write_tensors
from recipes.checkpoint.write_plan import describe, plan
from recipes.runtime.atomic import fsync_folder, write_synced
from recipes.runtime.ranks import Ranks

_LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class PreparedSave:
    """A save that all ranks have agreed on, and whose temporary folder is there.

    Attributes:
        ranks: Who takes part.
        root: The folder of the checkpoints.
        step: Optimizer steps done.
        index: Who writes what.
        entries: What this rank writes: keys and tensors, which are live until they are written or copied.
        state_json: The caller's state.
        keep: What is kept of the older ones.
    """

    ranks: Ranks
    root: Path
    step: int
    index: Index
    entries: Sequence[tuple[str, Tensor]]
    state_json: bytes
    keep: Retention

    @property
    def final(self) -> Path:
        """The checkpoint's folder once it is complete."""
        return self.root / step_name(self.step)

    @property
    def temporary(self) -> Path:
        """Where it is written."""
        return _temporary(self.root, self.step)

    def write(self, entries: Sequence[tuple[str, Tensor]] | None = None) -> FileRecord:
        """Writes this rank's file, without communication.

        Args:
            entries: Copies of `entries`; None writes those themselves.

        Raises:
            OSError: As the operating system raised it.
        """
        path = self.temporary / rank_file(self.ranks.rank)
        return write_tensors(path, self.entries if entries is None else entries)

    def publish(self, written: Sequence[Mapping[str, Any]]) -> None:
        """For the first rank: makes the checkpoint visible, then deletes what is not kept.

        Args:
            written: What `write` returned on every rank, dumped.

        Raises:
            OSError: As the operating system raised it.
            DiskError: Rank 0 does not see what another rank has written.
        """
        records = {rank_file(rank): FileRecord(**record) for rank, record in enumerate(written)}
        _publish(self, records)
        retain(self.root, self.final, self.keep)

    def discard(self) -> None:
        """For the first rank: removes what was written; what cannot be removed, the next save removes."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, GlobalTensor],
    state: Mapping[str, Any],
    rank_tensors: Mapping[str, Tensor] | None = None,
    *,
    keep_last: int | None = None,
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
        rank_tensors: What belongs to this rank only, such as random-number states.
        keep_last: Keep this checkpoint and the ``keep_last - 1`` others of the highest steps; None keeps all.
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
    save = prepare_save(Path(root), step, tensors, state, rank_tensors or {}, keep, Ranks(group))
    return write_and_publish(save)


def prepare_save(
    root: Path,
    step: int,
    tensors: Mapping[str, GlobalTensor],
    state: Mapping[str, Any],
    rank_tensors: Mapping[str, Tensor],
    keep: Retention,
    ranks: Ranks,
) -> PreparedSave:
    """Decides who writes what, and makes the temporary folder. Collective; see `save_checkpoint`."""
    assert step >= 0, f"a checkpoint of step {step}"
    placed: dict[str, Placed] = {}
    state_json = bytearray()

    def look() -> dict[str, Any]:
        placed.update((name, place(name, value)) for name, value in tensors.items())
        state_json.extend(_state_json(state))
        return {"step": step, "state": zlib.crc32(state_json), "tensors": describe(placed)}

    index = plan(ranks.together(f"preparing {root / step_name(step)}", look))
    temporary = _temporary(root, step)
    ranks.together(f"making {temporary}", lambda: _make(root, temporary) if ranks.is_rank0 else None)
    entries = _entries(index, ranks.rank, placed, rank_tensors)
    return PreparedSave(ranks, root, step, index, entries, bytes(state_json), keep)


def write_and_publish(save: PreparedSave) -> Path:
    """Writes while everybody waits. Collective; see `save_checkpoint`."""
    ranks = save.ranks
    try:
        written = ranks.together(f"writing {save.temporary}", lambda: save.write().model_dump())
        ranks.together(f"publishing {save.final}", lambda: save.publish(written) if ranks.is_rank0 else None)
    except GraftError:
        ranks.together(f"removing {save.temporary}", lambda: save.discard() if ranks.is_rank0 else None)
        raise
    return save.final


def _temporary(root: Path, step: int) -> Path:
    return root / (TEMPORARY + step_name(step))


def _state_json(state: Mapping[str, Any]) -> bytes:
    """The state as JSON, refusing keys that JSON would silently turn into strings."""
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
    """Removes what killed runs left, and makes the temporary folder."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(TEMPORARY + "*"):
        _LOG.info("removing the unfinished save %s", left)
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    temporary.mkdir()


def _entries(
    index: Index, rank: int, placed: Mapping[str, Placed], own: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """What this rank writes: the boxes that it owns, and its own tensors."""
    entries = [(f"rank/{name}", tensor) for name, tensor in own.items()]
    for name, held in placed.items():
        keys = {stored.key for stored in index.tensors[name].boxes if stored.rank == rank}
        pieces = ((f"global/{name}#{i}", piece.tensor) for i, piece in enumerate(held.pieces))
        entries += [(key, tensor) for key, tensor in pieces if key in keys]
    return entries


def _publish(save: PreparedSave, records: dict[str, FileRecord]) -> None:
    """Adds the JSON files, the manifest last, and gives the folder its name."""
    for name, data in ((INDEX, save.index.model_dump_json().encode()), (STATE, save.state_json)):
        write_synced(save.temporary / name, data)
        records[name] = FileRecord.of_bytes(data)
    for name, record in records.items():
        path = save.temporary / name
        size = path.stat().st_size if path.exists() else 0
        if size != record.size:
            rule = f"rank 0 sees {size} of the {record.size} bytes that were written"
            raise DiskError.one("file", str(path), rule, "Use a folder on a disk that all machines share.")
    manifest = Manifest.of(save.step, save.ranks.size, records)
    write_synced(save.temporary / MANIFEST, manifest.model_dump_json(indent=1).encode())
    fsync_folder(save.temporary)
    if save.final.exists():
        replaced = save.root / f"{TEMPORARY}replaced-{save.final.name}"
        save.final.rename(replaced)
        save.temporary.rename(save.final)
        shutil.rmtree(replaced)
    else:
        save.temporary.rename(save.final)
    fsync_folder(save.root)
