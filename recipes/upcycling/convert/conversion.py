"""Converts one tensor after the other, into files that are laid out already.

Memory holds one dense matrix and one block of an expert's. What is done is journalled with checksums, so that
a conversion that was interrupted goes on with what is still there; the output has its name only when it is
whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ModelError
from moe.upcycle.expert_rows import DenseMatrix, expert_bias, expert_blocks
from moe.upcycle.layer_plan import Draws, ExpertPlan
from recipes.checkpoint import require_space
from recipes.models.export.model_card import Origin, dense_name, write_card
from recipes.models.export.output_folder import output_folder
from recipes.models.export.placement import ExpertTensorKey
from recipes.models.export.write_export import dtype_keys, write_companions
from recipes.models.safetensors.tensor_files import TensorFiles, WrittenRun
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.user_json import read_json_object
from recipes.upcycling.convert.conversion_plan import (
    ConstantWork,
    Conversion,
    ExpertWork,
    KeptWork,
    RouterWork,
    Work,
)

_JOURNAL = "progress.json"
#: What the conversion was, beside the model.
RECORD = "graft_upcycle.json"
# Seconds between two entries of the journal; each waits for the disk.
_JOURNAL_INTERVAL_S = 10.0
# Elements of a tensor that is converted at a time.
_BLOCK_ELEMENTS = 1 << 23

#: Finished pieces of work, and what each has written.
_Done = dict[str, list[WrittenRun]]


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion.

    Attributes:
        path: The output.
        bytes_written: Bytes of its tensors, by this process.
        seconds: From the first tensor to the rename.
        resumed: Pieces of work that an earlier process had done.
        lost: Pieces that it had done, that the files no longer held, and that were made again.
    """

    path: Path
    bytes_written: int
    seconds: float
    resumed: int
    lost: int = 0


def convert(
    conversion: Conversion, out: Path, progress: Callable[[int], None] = lambda num_bytes: None
) -> ConversionResult:
    """Writes the MoE model.

    Args:
        conversion: The plan.
        out: Folder of the output; must not exist.
        progress: Told of every run of bytes that was written.

    Raises:
        ConfigError: The output exists already.
        InUseError: Another process is writing it.
        DiskError: There is no room for it.
        ModelError: The files do not hold what was written.
    """
    started = time.monotonic()
    with output_folder(out, resumes=True) as temporary:
        identity = _identity(conversion)
        earlier = _read_journal(temporary, identity)
        if not earlier:
            shutil.rmtree(temporary)
            temporary.mkdir()
            require_space(out, conversion.total_bytes, "the MoE model")
        files = TensorFiles(temporary, conversion.placement.specs)
        done = {key: runs for key, runs in earlier.items() if files.adopt(runs)}
        resumed = len(done)
        written = _write(conversion, files, progress, done, temporary, identity)
        try:
            files.finish()
        except ModelError:
            (temporary / _JOURNAL).unlink(missing_ok=True)  # nothing of it is taken over once more
            raise
        config = conversion.config | dtype_keys(conversion.main_dtype)
        request = conversion.request
        write_companions(temporary, config, request.dense, trust_remote_code=request.trust_remote_code)
        atomic_write_json(temporary / RECORD, _record(conversion))
        origin = Origin(dense_name(request.dense), request.method.name, "not trained since")
        write_card(temporary, conversion.exporter, conversion.spec, origin, request.layout)
        (temporary / _JOURNAL).unlink(missing_ok=True)
    seconds = time.monotonic() - started
    return ConversionResult(out, written, seconds, resumed, len(earlier) - resumed)


def _write(
    conversion: Conversion,
    files: TensorFiles,
    progress: Callable[[int], None],
    done: _Done,
    temporary: Path,
    identity: str,
) -> int:
    """Does the work that is not done yet; returns the bytes written."""
    written, last = 0, time.monotonic()
    writer = _Writer(conversion, files)
    for work in conversion.work:
        if work.key in done:
            continue
        first = len(files.runs)
        for num_bytes in writer.write(work):
            written += num_bytes
            progress(num_bytes)
        done[work.key] = files.runs[first:]
        if time.monotonic() - last > _JOURNAL_INTERVAL_S:
            files.sync()
            atomic_write_json(temporary / _JOURNAL, {"identity": identity, "done": done})
            last = time.monotonic()
    writer.close()
    return written


def _identity(conversion: Conversion) -> str:
    """Returns a hash of everything that the output depends on."""
    request = conversion.request
    content = {
        "method": asdict(request.method),
        "router": asdict(request.router),
        "seed": request.seed,
        "format": conversion.exporter.name,
        "layout": request.layout,
        "specs": [[s.name, str(s.dtype), list(s.shape)] for s in conversion.placement.specs],
        "files": [
            [str(path), path.stat().st_size, path.stat().st_mtime_ns]
            for source in conversion.files
            for path in sorted({stored.file for stored in source.tensors.values()})
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _read_journal(temporary: Path, identity: str) -> _Done:
    """Reads what an earlier process of the same conversion has done; nothing where that is not known."""
    try:
        content = read_json_object(temporary / _JOURNAL)
        if content["identity"] != identity:
            return {}
        return {key: [_run(*entry) for entry in entries] for key, entries in content["done"].items()}
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


def _run(name: str, offset: int, count: int, checksum: int) -> WrittenRun:
    return WrittenRun(str(name), int(offset), int(count), int(checksum))


def _record(conversion: Conversion) -> dict[str, Any]:
    request = conversion.request
    return {
        "method": asdict(request.method),
        "router": asdict(request.router),
        "seed": request.seed,
        "dense": request.dense.name,
        "format": conversion.exporter.name,
        "layout": request.layout,
        "claims_exact": conversion.claims_exact,
        "exact_in": conversion.exact_in,
    }


class _Writer:
    """Worker that reads the tensors of a step of work and writes its result."""

    def __init__(self, conversion: Conversion, files: TensorFiles) -> None:
        self._conversion = conversion
        self._placement = conversion.placement
        self._files = files

    def close(self) -> None:
        """Closes the dense checkpoints."""
        for source in self._conversion.files:
            source.close()

    def write(self, work: Work) -> Iterator[int]:
        """Does a step of work; yields the numbers of bytes as they are written."""
        if isinstance(work, KeptWork):
            yield from self._kept(work)
        elif isinstance(work, ExpertWork):
            yield from self._bias(work) if work.bias else self._matrix(work)
        elif isinstance(work, RouterWork):
            for key, tensor in self._conversion.routers[work.layer].state_dict().items():
                yield self._put(self._placement.router(work.layer, key), tensor)
        else:
            assert isinstance(work, ConstantWork), work
            yield self._put(work.name, self._placement.constants[work.name])

    def _put(self, name: str, tensor: Tensor, offset: int = 0) -> int:
        return self._files.write(name, tensor, offset) * self._files.spec(name).dtype.itemsize

    def _kept(self, work: KeptWork) -> Iterator[int]:
        name = self._placement.kept(work.name)
        target = self._files.spec(name)
        source, stored_name = work.sources[0]
        files = self._conversion.files[source]
        stored = files.tensors[stored_name]
        if len(work.sources) == 1 and stored.spec.dtype == target.dtype:
            files.require_finite(stored_name)
            self._files.copy(name, files.handle(stored.file), stored.start)
            yield target.num_bytes
            return
        total = torch.Size(target.shape).numel()
        for start in range(0, total, _BLOCK_ELEMENTS):
            stop = min(total, start + _BLOCK_ELEMENTS)
            parts = [self._conversion.files[s].read_run(n, start, stop) for s, n in work.sources]
            block = parts[0] if len(parts) == 1 else torch.stack([p.double() for p in parts]).mean(0)
            yield self._put(name, block, start)

    def _matrix(self, work: ExpertWork) -> Iterator[int]:
        dense = DenseMatrix(self._conversion.files[work.source].read_matrix(work.where))
        draws = Draws(self._conversion.request.seed, work.ffn.layer)
        for expert, plan in self._of_source(work):
            slot = self._placement.slot(ExpertTensorKey(work.ffn.layer, expert, work.matrix))
            offset = slot.offset
            for block in expert_blocks(plan, work.matrix, dense, draws.of_matrix(expert, work.matrix)):
                values = block if slot.factor == 1.0 else block * slot.factor
                yield self._put(slot.name, values, offset)
                offset += block.numel()

    def _bias(self, work: ExpertWork) -> Iterator[int]:
        dense = self._conversion.files[work.source].read_matrix(work.where)
        for expert, plan in self._of_source(work):
            slot = self._placement.slot(ExpertTensorKey(work.ffn.layer, expert, work.matrix, bias=True))
            yield self._put(slot.name, expert_bias(plan, work.matrix, dense) * slot.factor, slot.offset)

    def _of_source(self, work: ExpertWork) -> Iterator[tuple[int | None, ExpertPlan]]:
        """Returns the experts that are made of the work's dense network."""
        plan = self._conversion.plans[work.ffn.layer]
        experts: list[tuple[int | None, ExpertPlan]] = [*enumerate(plan.experts)]
        if plan.shared is not None:
            experts.append((None, plan.shared))
        for expert, expert_plan in experts:
            if expert_plan.source == work.source:
                yield expert, expert_plan
