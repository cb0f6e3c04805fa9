"""Files of a calibration: one state to go on from, and the finished statistics.

Both are safetensors with what they are of in their metadata, and are written in one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.errors import CheckpointError, Mistake
from recipes.models.hf.weight_files import weight_files
from recipes.runtime.atomic import atomic_file
from recipes.runtime.user_json import read_json_text

# Of each weight file, so much of its beginning and of its end counts in the fingerprint.
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class CalibrationFolder:
    """Folder ``calibration/`` of a run."""

    path: Path

    @staticmethod
    def of_run(run_dir: Path) -> CalibrationFolder:
        """Returns the folder of a run."""
        return CalibrationFolder(run_dir / "calibration")

    @property
    def state(self) -> Path:
        """State that an interrupted calibration goes on from."""
        return self.path / "state.safetensors"

    @property
    def statistics(self) -> Path:
        """The finished statistics."""
        return self.path / "statistics.safetensors"


@dataclass(frozen=True)
class Stored:
    """Content of either file.

    Attributes:
        tensors: By ``LAYER/NAME``.
        identity: What decides the statistics, by config path.
        place: The pass, and the batches of it that are done.
    """

    tensors: Mapping[str, Tensor]
    identity: Mapping[str, Any]
    place: tuple[int, int] = (0, 0)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Returns the tensors of one layer."""
        head = f"{index}/"
        return {key.removeprefix(head): value for key, value in self.tensors.items() if key.startswith(head)}

    def by_layer(self) -> dict[int, dict[str, Tensor]]:
        """Returns the tensors of every layer."""
        indices = {int(key.partition("/")[0]) for key in self.tensors}
        return {index: self.layer(index) for index in sorted(indices)}


def write_stored(path: Path, stored: Stored) -> None:
    """Writes a file in one step.

    Raises:
        DiskError: It could not be written; the old file, if any, is untouched.
    """
    from safetensors.torch import save_file

    metadata = {"identity": json.dumps(dict(stored.identity)), "place": json.dumps(stored.place)}
    # A file holds no two tensors of one storage, and no views with gaps.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in stored.tensors.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_stored(path: Path) -> Stored | None:
    """Reads a file; None where there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        pass_number, batches = read_json_text(metadata["place"], str(path))
        return Stored(tensors, read_json_text(metadata["identity"], str(path)), (pass_number, batches))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        rule, remedy = f"it is damaged ({error})", "Delete it to calibrate again, or restore it."
        raise CheckpointError.one("resume", str(path), rule, remedy) from error


def require_identity(path: Path, stored: Stored, wanted: Mapping[str, Any]) -> None:
    """Rejects statistics of another model, text or option.

    Raises:
        CheckpointError: Every field that differs is named with both values.
    """
    remedy = "Set it back to go on, or start a new run with resume=none."
    changed = [
        Mistake(key, wanted.get(key), f"{path} was gathered with {stored.identity.get(key)!r}", remedy)
        for key in sorted(set(stored.identity) | set(wanted))
        if stored.identity.get(key) != wanted.get(key)
    ]
    if changed:
        raise CheckpointError(changed)


def checkpoint_fingerprint(folder: Path) -> str:
    """Hashes a checkpoint's config and both ends of its weight files; a copy has the same hex SHA-256."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(weight_files(folder)):
        size = path.stat().st_size
        total.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            total.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()
