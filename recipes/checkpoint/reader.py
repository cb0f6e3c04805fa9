"""Loads checkpoints, whatever the number of ranks that wrote them; also single tensors, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.errors import CheckpointError, Mistake
from recipes.checkpoint.inventory import verify_checkpoint
from recipes.checkpoint.manifest import (
    Index,
    Manifest,
    StoredBox,
    damaged,
    rank_file,
    read_index,
    read_manifest,
    read_state,
)
from recipes.checkpoint.shard_layout import GlobalTensor, Piece, Placed, place
from recipes.runtime.ranks import Ranks

_NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Loaded:
    """Content of a checkpoint besides the tensors that were filled in place.

    Attributes:
        step: Optimizer steps done when it was saved.
        world_size: Number of ranks that saved it.
        state: The caller's state, as it was given to `save_checkpoint`.
        rank_tensors: Tensors that this rank saved as ``rank_tensors``; None if the number of ranks has
            changed.
        run: Id of the run that saved it; None where it had none.
    """

    step: int
    world_size: int
    state: dict[str, Any]
    rank_tensors: dict[str, Tensor] | None
    run: str | None = None


def load_checkpoint(
    path: str | Path,
    tensors: Mapping[str, GlobalTensor],
    *,
    checksums: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Loaded:
    """Fills ``tensors`` in place from a checkpoint that any number of ranks wrote. Collective.

    Every rank reads only the boxes that it holds. The names must be those of the checkpoint, no more and no
    fewer (all ranks together), with the same shapes and dtypes; nothing is overwritten otherwise.

    Args:
        path: The checkpoint's folder.
        tensors: Global name -> the tensor to fill.
        checksums: Whether to verify all files first; False if `find_checkpoint` or `verify_checkpoint` did.
        group: The ranks that take part; None is all of them, or this process alone.

    Raises:
        CheckpointError: Damaged, or of another model. Raised on all ranks.
    """
    folder, ranks = Path(path), Ranks(group)
    if checksums:
        verify_checkpoint(folder, group=group)
    what = f"loading {folder}"
    placed: dict[str, Placed] = {}
    sources: list[tuple[Manifest, Index]] = []

    def compare() -> dict[str, Any]:
        manifest = read_manifest(folder)
        sources.append((manifest, read_index(folder, manifest)))
        placed.update((name, place(name, value)) for name, value in tensors.items())
        return _differences(sources[0][1], placed)

    _require_no_differences(folder, ranks.together(what, compare))
    manifest, index = sources[0]
    loaded: list[Loaded] = []

    def read() -> None:
        with RankFiles(folder) as files:
            for name, held in placed.items():
                for piece in held.pieces:
                    _fill(piece, index.tensors[name].boxes, files)
            same = manifest.world_size == ranks.size
            own = files.rank_tensors(ranks.rank) if same else None
        state = read_state(folder)
        loaded.append(Loaded(manifest.step, manifest.world_size, state, own, manifest.run))

    ranks.together(what, read)
    return loaded[0]


def _differences(index: Index, placed: Mapping[str, Placed]) -> dict[str, Any]:
    """Compares the tensors that this rank wants with those in the checkpoint."""
    changed = []
    for name, held in placed.items():
        stored = index.tensors.get(name)
        wanted = f"{str(held.dtype).removeprefix('torch.')} {list(held.shape)}"
        if stored and wanted != (found := f"{stored.dtype} {list(stored.shape)}"):
            changed.append(f"{name} ({found}, the run has {wanted})")
    return {
        "missing": [name for name in placed if name not in index.tensors],
        "unexpected": [name for name in index.tensors if name not in placed],
        "changed": changed,
    }


def _require_no_differences(folder: Path, differences: list[dict[str, list[str]]]) -> None:
    """Raises one error, the same on every rank, for all tensors that any rank misses or no rank expects."""
    missing = dict.fromkeys(name for one in differences for name in one["missing"])
    changed = dict.fromkeys(text for one in differences for text in one["changed"])
    common = set.intersection(*(set(one["unexpected"]) for one in differences))
    unexpected = [name for name in differences[0]["unexpected"] if name in common]
    remedy = "Resume with the configuration that this checkpoint was saved with."
    mistakes = []
    for names, rule in (
        (list(missing), "tensors of this run are not in the checkpoint"),
        (unexpected, "tensors of the checkpoint are not in this run"),
        (list(changed), "tensors have another dtype or shape in the checkpoint"),
    ):
        if names:
            shown = ", ".join(names[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            mistakes.append(Mistake(str(folder), shown + more, f"{len(names)} {rule}", remedy))
    if mistakes:
        raise CheckpointError(mistakes)


class RankFiles(ExitStack):
    """The rank files of a checkpoint, each opened once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._open: dict[int, Any] = {}

    def path(self, rank: int) -> Path:
        """Returns the path of the file of ``rank``."""
        return self._folder / rank_file(rank)

    def of(self, rank: int) -> Any:
        """Returns the open file of ``rank``."""
        if rank not in self._open:
            try:
                self._open[rank] = self.enter_context(safe_open(self.path(rank), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise damaged(self.path(rank), str(error), "is not a readable safetensors file") from error
        return self._open[rank]

    def read(self, stored: StoredBox, wanted: tuple[slice, ...]) -> Tensor:
        """Reads the part ``wanted`` of a stored box, and nothing else of it."""
        file = self.of(stored.rank)
        try:
            part = file.get_slice(stored.key)
            shape = tuple(part.get_shape())
            if shape != stored.size:
                raise damaged(self.path(stored.rank), shape, f"{stored.key} should have shape {stored.size}")
            value: Tensor = part[wanted] if wanted else file.get_tensor(stored.key)
        except SafetensorError as error:
            raise damaged(self.path(stored.rank), str(error), f"{stored.key} cannot be read") from error
        return value

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """Reads the tensors that ``rank`` saved for itself."""
        file, prefix = self.of(rank), "rank/"
        keys: Iterator[str] = (key for key in file.keys() if key.startswith(prefix))  # noqa: SIM118
        return {key.removeprefix(prefix): file.get_tensor(key).clone() for key in keys}


@torch.no_grad()
def _fill(piece: Piece, stored_boxes: list[StoredBox], files: RankFiles) -> None:
    """Overwrites one local piece from all the stored boxes that reach into it."""
    filled = 0
    for stored in stored_boxes:
        common = piece.box.overlap(stored.box)
        if common is None:
            continue
        value = files.read(stored, common.within(stored.box))
        piece.tensor[common.within(piece.box)].copy_(value)
        filled += common.numel
    assert filled == piece.box.numel, f"filled {filled} of {piece.box.numel} elements: the boxes overlap"


class CheckpointTensors:
    """The global tensors of one checkpoint, read whole by one process without a process group.

    Attributes:
        folder: The checkpoint.
        step: Optimizer steps done when it was saved.
    """

    def __init__(self, folder: Path, index: Index, step: int, files: RankFiles) -> None:
        self.folder = folder
        self.step = step
        self._index = index
        self._files = files

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with ``prefix``, without it."""
        return [name.removeprefix(prefix) for name in self._index.tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._index.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor."""
        found: torch.dtype = getattr(torch, self._index.tensors[name].dtype)
        return found

    def read(self, name: str) -> Tensor:
        """Assembles a tensor from the boxes that the ranks wrote."""
        stored = self._index.tensors[name]
        whole = torch.empty(tuple(stored.shape), dtype=self.dtype(name))
        for box in stored.boxes:
            place = tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))
            whole[place] = self._files.read(box, tuple(slice(0, s) for s in box.size))
        return whole


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[CheckpointTensors]:
    """Opens the files of a checkpoint for reading; call `verify_checkpoint` first.

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    with RankFiles(folder) as files:
        yield CheckpointTensors(folder, index, manifest.step, files)
