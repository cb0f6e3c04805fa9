"""Figures of a run that know their reduction across ranks, and the file that keeps them.

A log is JSON lines (``metrics.jsonl``, ``load.jsonl``): one object per line, in the order of training. Every
line is valid JSON, also when training diverges: a number that is not finite is written as ``null``, with its
name beside it (``"loss": null, "loss_nonfinite": "nan"``); `read_rows` turns it back into the float. In a
list it is ``null`` alone and reads back as NaN.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import DataError, DiskError
from recipes.runtime.atomic import atomic_file, disk_mistake, sync_file
from recipes.runtime.user_json import read_json_text

_LOG = logging.getLogger("graft.metrics")
NONFINITE = "_nonfinite"
_TAIL_BLOCK = 1 << 16  # bytes read at a time when looking for the last complete line


@dataclass(frozen=True)
class Metric:
    """Figure of one rank, with its reduction over ranks.

    Attributes:
        value: A number, or a tensor of one element on any device.
        reduce: ``mean``, ``sum``, ``max`` or ``min`` over the ranks.
    """

    value: Tensor | float
    reduce: Literal["mean", "sum", "max", "min"] = "mean"


def reduce_metrics(metrics: Mapping[str, Metric], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Reduces the figures of a step over the ranks, in at most two collectives and one device read.

    Everything is packed into one fp64 vector for sums (a mean is a sum divided by the ranks) and one for
    maxima (a minimum is a negated maximum). NaN on any rank gives NaN, whatever the reduction: maxima of the
    back ends may lose it, so that NaNs are counted in the sums.

    Args:
        metrics: The same names and reductions on every rank, in any order.
        group: The ranks to reduce over; None is this rank alone, as in `moe.types.RouterContext`.

    Returns:
        The reduced figures, in the order given.
    """
    names = sorted(metrics)
    sums = [name for name in names if metrics[name].reduce in ("mean", "sum")]
    extremes = [name for name in names if metrics[name].reduce in ("max", "min")]
    signs = [-1.0 if metrics[name].reduce == "min" else 1.0 for name in extremes]
    world = dist.get_world_size(group) if group is not None else 1
    device = _device(metrics, group)
    extremes_N = _pack([metrics[name] for name in extremes], device) * _pack(
        [Metric(s) for s in signs], device
    )
    lost_N = extremes_N.isnan()
    checksum = float(zlib.crc32("\n".join(f"{name} {metrics[name].reduce}" for name in names).encode()))
    sums_N = torch.cat(
        (_pack([metrics[name] for name in sums], device), lost_N.double(), _pack([Metric(checksum)], device))
    )
    extremes_N = extremes_N.masked_fill(lost_N, -math.inf)
    if group is not None:
        dist.all_reduce(sums_N, group=group)
        if extremes:
            dist.all_reduce(extremes_N, op=dist.ReduceOp.MAX, group=group)
    values = torch.cat((sums_N, extremes_N)).tolist()
    totals, rest = values[: len(sums)], values[len(sums) :]
    lost, check, largest = rest[: len(extremes)], rest[len(extremes)], rest[len(extremes) + 1 :]
    assert check == checksum * world, f"the ranks reduce different figures; this one has {names}"
    reduced = {
        name: total / world if metrics[name].reduce == "mean" else total
        for name, total in zip(sums, totals, strict=True)
    }
    for name, sign, nans, value in zip(extremes, signs, lost, largest, strict=True):
        reduced[name] = math.nan if nans else sign * value
    return {name: reduced[name] for name in metrics}


def _device(metrics: Mapping[str, Metric], group: dist.ProcessGroup | None) -> torch.device:
    """Returns the device of the reduction: the accelerator if a figure is there or the group needs it."""
    if group is not None and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    if group is not None:
        return torch.device("cpu")
    tensors = (m.value for m in metrics.values() if isinstance(m.value, Tensor))
    return next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))


def _pack(metrics: list[Metric], device: torch.device) -> Tensor:
    """Packs ``[N]`` fp64 values on ``device``. Numbers are copied together, tensors without a host read."""
    if not metrics:
        return torch.zeros(0, dtype=torch.float64, device=device)
    numbers = [0.0 if isinstance(m.value, Tensor) else float(m.value) for m in metrics]
    packed_N = torch.tensor(numbers, dtype=torch.float64).to(device)
    places = [i for i, m in enumerate(metrics) if isinstance(m.value, Tensor)]
    if places:
        tensors = [m.value for m in metrics if isinstance(m.value, Tensor)]
        assert all(t.numel() == 1 for t in tensors), f"shapes {[tuple(t.shape) for t in tensors]}"
        cells = [t.detach().to(device=device, dtype=torch.float64).reshape(()) for t in tensors]
        packed_N[torch.tensor(places, device=device)] = torch.stack(cells)
    return packed_N


class MetricsLog:
    """Append-only JSON-lines file that survives being killed at any moment.

    Each row reaches the operating system when it is appended, and the disk at `sync` and `close`. Opening
    a log drops a last line that a killed run left unfinished, with a warning.

    Args:
        path: The file; its folder is made when missing.

    Raises:
        DiskError: It cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = _drop_torn_line(self.path)
            self._descriptor = _open(self.path)
        except OSError as error:
            raise DiskError([disk_mistake(self.path, error)]) from error
        if torn:
            _LOG.warning("%s: dropped an unfinished last line (%d bytes) of a killed run", self.path, torn)

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends one row and hands it to the operating system.

        Raises:
            DiskError: The disk is full, or the file cannot be written any more; it is as it was before.
            TypeError: A value is not JSON.
        """
        line = json.dumps(_writable(row), allow_nan=False, separators=(",", ":")) + "\n"
        data = memoryview(line.encode())
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # no half line before the next row
                os.ftruncate(self._descriptor, end)
            raise DiskError([disk_mistake(self.path, error)]) from error

    def truncate_after(self, stage: str, step: int) -> int:
        """Drops, in one atomic step, the rows of ``stage`` past ``step``; a resumed run writes them again.

        Args:
            stage: Only rows of this stage are dropped.
            step: The last step to keep; -1 drops the whole stage.

        Returns:
            The number of dropped rows.

        Raises:
            DiskError: The file cannot be rewritten; it is as it was.
            DataError: A line is not a row.
        """
        kept: list[bytes] = []
        dropped = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            row = _parse(line, self.path, number)
            past = row.get("stage") == stage and row.get("step", -1) > step
            dropped += past
            if not past:
                kept.append(line)
        if dropped:
            self._replace(b"".join(kept))
            _LOG.info("%s: dropped %d rows of stage %s after step %d", self.path, dropped, stage, step)
        return dropped

    def sync(self) -> None:
        """Waits until the disk has every row. Call it when a checkpoint is written."""
        try:
            sync_file(self._descriptor)
        except OSError as error:
            raise DiskError([disk_mistake(self.path, error)]) from error

    def close(self) -> None:
        """Syncs and closes; closing twice is fine."""
        if self._descriptor < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _replace(self, data: bytes) -> None:
        """Puts ``data`` in the place of the file, and appends to the new one from now on."""
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(data)
            descriptor = _open(temporary)
        os.close(self._descriptor)
        self._descriptor = descriptor


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads a log, row by row, while a run may still be writing it.

    An unfinished last line is left out, with a warning. A missing file has no rows.

    Raises:
        DataError: Another line is not a row; the message has its number.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                _LOG.warning("%s: left out line %d, which is unfinished", path, number)
                return
            yield _readable(_parse(line, path, number))


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _drop_torn_line(path: Path) -> int:
    """Cuts the file behind its last newline; returns how many bytes that took away."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _TAIL_BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
    return size - end


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = read_json_text(line, str(path))
    except ValueError:
        row = None
    if isinstance(row, dict) and "leg" in row and "stage" not in row:
        row = {"stage": row.pop("leg"), **row}  # as written before the key was renamed; to be deleted at 1.0
    if not isinstance(row, dict):
        shown = line[:60].decode(errors="replace").rstrip()
        remedy = "Remove that line, or restore the file from a copy."
        raise DataError.one(f"{path}, line {number}", shown, "is not a JSON object", remedy)
    return row


def _writable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row as valid JSON, with a companion key for each number that is not finite."""
    clean: dict[str, Any] = {}
    for key, value in row.items():
        plain = value.tolist() if hasattr(value, "tolist") else value
        clean[key] = _finite(plain)
        if isinstance(plain, float) and clean[key] is None:
            clean[key + NONFINITE] = repr(plain)
    return clean


def _finite(value: Any) -> Any:
    """Converts tensors and arrays to Python numbers and lists, and replaces NaN and infinities by None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_writable`."""
    back: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith(NONFINITE) and row.get(key.removesuffix(NONFINITE), 0) is None:
            continue
        if value is None and key + NONFINITE in row:
            back[key] = float(row[key + NONFINITE])
        else:
            back[key] = _with_nan(value) if isinstance(value, list) else value
    return back


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
