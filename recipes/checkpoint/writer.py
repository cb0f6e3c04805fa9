"""Saves a checkpoint: every rank its own file, all or nothing, then deletes what is too old."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe.errors import CheckpointError, ConfigError, DiskError, GraftError
from recipes.atomic import fsync_folder, write_synced
from recipes.checkpoint.layout import GlobalTensor, Placed, place
from recipes.checkpoint.manifest import FileRecord, Index, Manifest
from recipes.checkpoint.names import INDEX, MANIFEST, STATE, TEMPORARY, parse_step, rank_file, step_name
from recipes.checkpoint.plan import describe, plan
from recipes.checkpoint.ranks import Ranks
from recipes.checkpoint.stream import write_tensors

_LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class _Save:
    """One save in progress: who takes part, and where it is written before it gets its name."""

    ranks: Ranks
    root: Path
    step: int

    @property
    def final(self) -> Path:
        return self.root / step_name(self.step)

    @property
    def temporary(self) -> Path:
        return self.root / (TEMPORARY + step_name(self.step))


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
    assert step >= 0, f"a checkpoint of step {step}"
    if keep_last is not None and keep_last < 1:
        raise ConfigError.one(
            "keep_last", keep_last, "would delete the checkpoint just written", "Give 1 or more."
        )
    save = _Save(Ranks(group), Path(root), step)
    own = dict(rank_tensors or {})
    placed: dict[str, Placed] = {}
    state_json = bytearray()

    def look() -> dict[str, Any]:
        placed.update((name, place(name, value)) for name, value in tensors.items())
        state_json.extend(_state_json(state))
        return {"step": step, "state": zlib.crc32(state_json), "tensors": describe(placed)}

    index = plan(save.ranks.together(f"preparing {save.final}", look))
    try:
        _write_all(save, index, placed, own, bytes(state_json), keep_last)
    except GraftError:
        save.ranks.together(f"removing {save.temporary}", lambda: _remove_unfinished(save))
        raise
    return save.final


def _write_all(
    save: _Save,
    index: Index,
    placed: Mapping[str, Placed],
    own: Mapping[str, Tensor],
    state_json: bytes,
    keep_last: int | None,
) -> None:
    """The three steps with a meeting of all ranks after each: make the folder, write, publish."""
    ranks = save.ranks
    ranks.together(f"making {save.temporary}", lambda: _prepare(save) if ranks.leads else None)
    written = ranks.together(
        f"writing {save.temporary}", lambda: _write_rank(save, index, placed, own).model_dump()
    )
    records = {rank_file(rank): FileRecord(**record) for rank, record in enumerate(written)}

    def publish() -> None:
        if ranks.leads:
            _publish(save, index, state_json, records)
            _retain(save, keep_last)

    ranks.together(f"publishing {save.final}", publish)


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


def _prepare(save: _Save) -> None:
    """Removes what killed runs left, and makes the temporary folder."""
    save.root.mkdir(parents=True, exist_ok=True)
    for left in save.root.glob(TEMPORARY + "*"):
        _LOG.info("removing the unfinished save %s", left)
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    save.temporary.mkdir()


def _write_rank(
    save: _Save, index: Index, placed: Mapping[str, Placed], own: Mapping[str, Tensor]
) -> FileRecord:
    """Writes this rank's file: the boxes that it owns, and its own tensors."""
    entries = [(f"rank/{name}", tensor) for name, tensor in own.items()]
    for name, held in placed.items():
        keys = {stored.key for stored in index.tensors[name].boxes if stored.rank == save.ranks.rank}
        pieces = ((f"global/{name}#{i}", piece.tensor) for i, piece in enumerate(held.pieces))
        entries += [(key, tensor) for key, tensor in pieces if key in keys]
    return write_tensors(save.temporary / rank_file(save.ranks.rank), entries)


def _publish(save: _Save, index: Index, state_json: bytes, records: dict[str, FileRecord]) -> None:
    """Adds the JSON files, the manifest last, and gives the folder its name."""
    for name, data in ((INDEX, index.model_dump_json().encode()), (STATE, state_json)):
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


def _retain(save: _Save, keep_last: int | None) -> None:
    """Deletes the oldest complete checkpoints. A failure is only logged: the new checkpoint is safe."""
    if keep_last is None:
        return
    older = [
        path
        for path in save.root.iterdir()
        if parse_step(path.name) is not None and path != save.final and (path / MANIFEST).is_file()
    ]
    older.sort(key=lambda path: parse_step(path.name) or 0, reverse=True)
    for path in older[keep_last - 1 :]:
        # Under its temporary name it is no checkpoint any more, and the next save removes what is left of it.
        doomed = save.root / f"{TEMPORARY}deleted-{path.name}"
        try:
            path.rename(doomed)
            (doomed / MANIFEST).unlink()
            shutil.rmtree(doomed)
        except OSError as error:
            _LOG.warning("could not delete the old checkpoint %s: %s", path, error)


def _remove_unfinished(save: _Save) -> None:
    """Leaves no trace of a save that failed; what cannot be removed now, the next save removes."""
    if save.ranks.leads:
        shutil.rmtree(save.temporary, ignore_errors=True)
