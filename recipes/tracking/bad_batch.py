"""Records the samples of a step whose loss or gradient was not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from moe.errors import DiskError
from recipes.runtime.atomic import atomic_write_text
from recipes.runtime.ranks import Ranks

FOLDER = "faults"


@dataclass(frozen=True)
class BadStep:
    """A step that updated nothing.

    Attributes:
        stage: Stage of the run.
        step: Counted from 1, as in ``metrics.jsonl``.
        loss: Mean over all ranks.
        grad_norm: Norm over all ranks.
        in_a_row: Number of consecutive bad steps, including this one.
    """

    stage: str
    step: int
    loss: float
    grad_norm: float
    in_a_row: int


@dataclass(frozen=True)
class BatchRecord:
    """Record of a bad step.

    Attributes:
        path: The file; None where it could not be written or was not requested.
        bad_ranks: Ranks with a loss that is not finite; empty if the problem arose in a backward pass.
        problem: Reason why it could not be written.
    """

    path: Path | None
    bad_ranks: tuple[int, ...]
    problem: str | None = None


def record_bad_batch(
    bad: BadStep,
    losses: Sequence[float],
    samples: Sequence[tuple[int, int]],
    folder: Path | None,
    group: ProcessGroup | None,
) -> BatchRecord:
    """Gathers the losses of every rank and writes them readably on rank 0. Collective.

    Args:
        bad: The step.
        losses: Losses of this rank's micro-batches.
        samples: First sample and number of samples of each of them.
        folder: The run directory; None writes nothing.
        group: Ranks that see different data.
    """
    ranks = Ranks(group)
    own = {"losses": [_number(loss) for loss in losses], "samples": [list(pair) for pair in samples]}
    everyone = ranks.gather(own)
    bad_ranks = tuple(rank for rank, found in enumerate(everyone) if not _all_finite(found["losses"]))
    if folder is None:
        return BatchRecord(None, bad_ranks)
    path = folder / FOLDER / f"{bad.stage}-step-{bad.step:08d}.json"
    if not ranks.is_rank0:
        return BatchRecord(path, bad_ranks)
    try:
        atomic_write_text(path, _text(bad, bad_ranks, everyone))
    except DiskError as error:
        return BatchRecord(None, bad_ranks, str(error))
    return BatchRecord(path, bad_ranks)


def _text(bad: BadStep, bad_ranks: Sequence[int], everyone: Sequence[dict[str, Any]]) -> str:
    content = asdict(bad) | {"loss": _number(bad.loss), "grad_norm": _number(bad.grad_norm)}
    content["ranks_with_a_bad_loss"] = list(bad_ranks)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    ranks = [f"    {json.dumps({'rank': rank} | found)}" for rank, found in enumerate(everyone)]
    # A line a rank: `samples` are [first, number] of each micro-batch.
    return "{\n" + ",\n".join([*lines, '  "ranks": [\n' + ",\n".join(ranks) + "\n  ]"]) + "\n}\n"


def _number(value: float) -> float | str:
    """Replaces NaN and infinities by text, which JSON lacks."""
    return value if math.isfinite(value) else repr(value)


def _all_finite(values: Sequence[float | str]) -> bool:
    return all(not isinstance(value, str) for value in values)
