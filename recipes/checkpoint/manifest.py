"""The files of a checkpoint folder: their names, the types of the JSON ones, and checks against the manifest.

A checkpoint is a folder ``step-<n>``::

    rank-00000.safetensors   written by rank 0: ``global/<name>#<i>`` boxes and ``rank/<name>`` tensors
    index.json               dtype and shape of every global tensor, and which rank wrote which box of it
    state.json               the caller's JSON state
    manifest.json            format, step, world size, run, its parent, size and CRC-32 of every other file;
                             written last

Files are checked by CRC-32: it finds every burst of up to 32 wrong bits and misses other damage once in
2^32. It guards against broken disks and broken copies, not against forgery. Measured on one core, zlib's runs
at 6.0 GiB/s, sha256 at 1.9 and blake2b at 1.0; CRC-32 never makes a save or a check slower than its disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe.errors import CheckpointError, Mistake
from recipes.checkpoint.shard_layout import Box, cover_fault
from recipes.runtime.user_json import read_json_text, read_regular

MANIFEST = "manifest.json"
INDEX = "index.json"
STATE = "state.json"
TEMPORARY = ".tmp-"
"""Prefix of folders that are no complete checkpoint, or none any more."""
FORMAT = "graft-checkpoint"
VERSION = 2
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 8 * 2**20
_REMEDY = "Resume from another checkpoint, or restore this one from a copy."

Count = Annotated[int, Field(ge=0)]
_M = TypeVar("_M", bound=BaseModel)


def step_name(step: int) -> str:
    """Returns the name of the folder that holds the checkpoint of ``step``."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """Returns the step in a checkpoint folder's name, or None if it is no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    """Returns the name of the file that ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def expected_files(world_size: int) -> set[str]:
    """Returns the names of all files of a checkpoint but the manifest. No other name is ever opened."""
    return {INDEX, STATE, *(rank_file(rank) for rank in range(world_size))}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileRecord(_Model):
    """Size of a file in bytes, and its CRC-32 as eight hexadecimal digits."""

    size: Count
    crc32: str

    @classmethod
    def of(cls, size: int, crc: int) -> Self:
        """Makes the record of a file of ``size`` bytes whose CRC-32 is ``crc``."""
        return cls(size=size, crc32=f"{crc:08x}")

    @classmethod
    def of_bytes(cls, data: bytes) -> Self:
        """Makes the record of a file that holds ``data``."""
        return cls.of(len(data), zlib.crc32(data))


class StoredBox(_Model):
    """One box of a global tensor, stored under ``key`` in the file of ``rank``."""

    rank: Count
    key: str
    offset: tuple[Count, ...]
    size: tuple[Annotated[int, Field(ge=1)], ...]

    @property
    def box(self) -> Box:
        """Its place in the global tensor."""
        return Box(self.offset, self.size)


class StoredTensor(_Model):
    """A global tensor: dtype as torch names it (``bfloat16``), shape, and the boxes that make it up."""

    dtype: str
    shape: tuple[Count, ...]
    boxes: list[StoredBox]

    @model_validator(mode="after")
    def _boxes_cover(self) -> Self:
        for stored in self.boxes:
            if not stored.box.inside(self.shape):
                raise ValueError(f"the box {stored.offset} + {stored.size} leaves the shape {self.shape}")
        boxes = [stored.box for stored in self.boxes]
        if fault := cover_fault(self.shape, boxes):
            held = sum(box.numel for box in boxes)
            raise ValueError(f"its boxes hold {held} of {math.prod(self.shape)} elements: {fault}")
        return self


class Index(_Model):
    """Index of all global tensors of a checkpoint by name."""

    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Origin:
    """Origin of a checkpoint.

    Attributes:
        run: Id of the run that saves it; None where nobody has given it one.
        parent: The checkpoint that its training went on from, as ``RUN/step-N``; None for none.
    """

    run: str | None = None
    parent: str | None = None


class Manifest(_Model):
    """Manifest that makes a folder a complete checkpoint. ``checksum`` is that of the other fields.

    Version 1 had neither ``run`` nor ``parent``.
    """

    format: Literal["graft-checkpoint"] = "graft-checkpoint"
    version: Literal[1, 2] = 2
    run: str | None = None
    parent: str | None = None
    step: Count
    world_size: Annotated[int, Field(ge=1)]
    files: dict[str, FileRecord]
    checksum: str

    @classmethod
    def of(
        cls, step: int, world_size: int, files: dict[str, FileRecord], origin: Origin | None = None
    ) -> Self:
        """Makes the manifest of ``files``."""
        run, parent = (None, None) if origin is None else (origin.run, origin.parent)
        draft = cls(step=step, world_size=world_size, files=files, run=run, parent=parent, checksum="")
        return draft.model_copy(update={"checksum": draft.own_checksum()})

    def own_checksum(self) -> str:
        """Computes the CRC-32 of all fields but the checksum."""
        later = {"run", "parent"} if self.version == 1 else set()
        text = json.dumps(self.model_dump(exclude={"checksum", *later}), sort_keys=True)
        return f"{zlib.crc32(text.encode()):08x}"


def damaged(path: Path, value: Any, rule: str, remedy: str = _REMEDY) -> CheckpointError:
    """Makes the error for something wrong with ``path``."""
    return CheckpointError.one(str(path), value, rule, remedy)


def all_at_once(checks: Iterable[Callable[[], None]]) -> None:
    """Runs every check and raises one error for all that failed.

    Raises:
        CheckpointError: The mistakes of all failed checks.
    """
    mistakes: list[Mistake] = []
    for check in checks:
        try:
            check()
        except CheckpointError as error:
            mistakes += error.mistakes
    if mistakes:
        raise CheckpointError(mistakes)


def read_manifest(folder: Path) -> Manifest:
    """Reads ``folder/manifest.json`` and checks that all files it lists are there with the right size.

    Raises:
        CheckpointError: No checkpoint, an incomplete one, or one of another format version.
    """
    manifest = parse_manifest(folder)
    all_at_once(partial(_check_size, folder / name, record) for name, record in manifest.files.items())
    return manifest


def require_own(folder: Path, manifest: Manifest, run: str | None) -> None:
    """Refuses a checkpoint whose folder is named as another step, or that another run has saved.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        run: Id of the run; None for any. Checkpoints of before there were ids belong to every run.

    Raises:
        CheckpointError: It is one of these.
    """
    path, named = folder / MANIFEST, parse_step(folder.name)
    if named not in (None, manifest.step):
        remedy = f"Name the folder {step_name(manifest.step)}, or remove it."
        raise damaged(path, f"of step {manifest.step}", f"is of another step than {folder.name}", remedy)
    if run is not None and manifest.run not in (None, run):
        remedy = "Put back the run's own checkpoint, or remove this one."
        raise damaged(path, f"of run {manifest.run}", f"belongs to another run than this, {run}", remedy)


def parse_manifest(folder: Path) -> Manifest:
    """Reads ``folder/manifest.json`` alone.

    Raises:
        CheckpointError: It is missing, damaged, or of another format version.
    """
    if not folder.is_dir():
        raise damaged(folder, "missing", "there is no such checkpoint folder", "Check the path.")
    path = folder / MANIFEST
    data = _read(path, "without it the checkpoint was never completed, or is being deleted")
    raw = _json(path, data)
    version = raw.get("version") if isinstance(raw, dict) and raw.get("format") == FORMAT else None
    if isinstance(version, int) and version > VERSION:
        raise damaged(
            path, version, f"is newer than version {VERSION}, which this Graft reads", "Update Graft."
        )
    manifest = _parse(Manifest, path, data)
    if manifest.checksum != manifest.own_checksum():
        raise damaged(path, manifest.checksum, f"its own checksum should be {manifest.own_checksum()}")
    odd = sorted(set(manifest.files) ^ expected_files(manifest.world_size))
    if odd:
        raise damaged(
            path, odd[:5], f"does not list the files of {manifest.world_size} ranks, and only those"
        )
    return manifest


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Reads ``folder/index.json``.

    Raises:
        CheckpointError: It cannot be read, or names ranks that wrote nothing.
    """
    path = folder / INDEX
    index = _parse(Index, path, _read(path, "is missing"))
    last = max((box.rank for stored in index.tensors.values() for box in stored.boxes), default=0)
    if last >= manifest.world_size:
        raise damaged(path, last, f"names a rank, but there are only {manifest.world_size}")
    return index


def read_state(folder: Path) -> dict[str, Any]:
    """Reads ``folder/state.json``."""
    path = folder / STATE
    state = _json(path, _read(path, "is missing"))
    if not isinstance(state, dict):
        raise damaged(path, type(state).__name__, "does not hold a JSON object")
    return state


def _json(path: Path, data: bytes) -> Any:
    try:
        return read_json_text(data, str(path))
    except ValueError as error:
        raise damaged(path, "damaged", str(error)) from None


def check_file(path: Path, record: FileRecord) -> None:
    """Reads a file in full and compares its checksum.

    Raises:
        CheckpointError: It is missing, cannot be read, or holds something else.
    """
    _check_size(path, record)
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise damaged(path, error.strerror, "cannot be read") from error
    if f"{crc:08x}" != record.crc32:
        raise damaged(path, f"{crc:08x}", f"its checksum should be {record.crc32}: the file is damaged")


def _check_size(path: Path, record: FileRecord) -> None:
    if path.is_symlink() or not path.is_file():
        raise damaged(path, "missing", "is not a file of its own in the checkpoint's folder")
    size = path.stat().st_size
    if size != record.size:
        raise damaged(path, f"{size} bytes", f"should have {record.size} bytes")


def _read(path: Path, why_needed: str) -> bytes:
    if not os.path.lexists(path):
        raise damaged(path, "missing", why_needed)
    try:
        return read_regular(path)
    except ValueError as error:
        raise damaged(path, "unreadable", str(error)) from None


def _parse(model: type[_M], path: Path, data: bytes) -> _M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(path, where or "content", f"does not have the right form: {first['msg']}") from None
