"""Standard columns of a table of runs, with their meanings and bounds, and the parser of such tables.

The parser takes text and returns arrays; callers read the file.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, Mistake

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """Standard column.

    Attributes:
        meaning: Meaning, with the unit.
        least: Lower bound.
        below: Upper bound, itself not allowed.
        closed: Allows `least` itself.
    """

    meaning: str
    least: float = 0.0
    below: float = math.inf
    closed: bool = False

    def rule_broken(self, value: float) -> str | None:
        """Returns the rule that a value breaks, or None."""
        if not math.isfinite(value):
            return "it must be a finite number"
        if value < self.least or (value == self.least and not self.closed):
            return f"it must be {'at least' if self.closed else 'more than'} {self.least:g}"
        return f"it must be less than {self.below:g}" if value >= self.below else None


COLUMNS: Mapping[str, Column] = {
    "loss": Column("cross-entropy on held-out text, nats a token"),
    "params": Column("parameters of the whole model"),
    "active_params": Column("parameters that a token meets"),
    "dense_params": Column("parameters of the dense model that is upcycled"),
    "tokens": Column("tokens of this training run (of an upcycled model: after the conversion)"),
    "dense_tokens": Column("tokens that the dense model was trained on before the conversion"),
    "num_experts": Column("routed experts of a layer; 1 for a dense model", 1.0, closed=True),
    "top_k": Column("experts a token goes to", 1.0, closed=True),
    "granularity": Column("dense FFN width over expert width; 1 for whole experts"),
    "sparsity": Column("1 - top_k / num_experts; made from these two where it is missing", 0.0, 1.0, True),
}


@dataclass(frozen=True)
class Runs:
    """Table of runs.

    Attributes:
        path: Origin of the table, for messages.
        columns: The standard columns, ``[R]`` fp64 each.
        ignored: Names of the other columns.
    """

    path: str
    columns: Mapping[str, Array]
    ignored: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(next(iter(self.columns.values())))


def parse_runs(text: str, path: str) -> Runs:
    """Reads a comma-separated table with a header.

    Args:
        text: Content of the table. Empty lines and lines that start with ``#`` are skipped.
        path: Origin of the table, for messages.

    Raises:
        DataError: Duplicate or missing header, a row of another length, or a value that a standard column may
            not hold (all mistakes, up to 20).
    """
    lines = [(n, line) for n, line in enumerate(text.lstrip("\ufeff").splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) < 2:
        remedy = "Give one line of column names and one line a run."
        raise DataError.one(path, f"{len(lines)} lines", "it holds no runs", remedy)
    header = [name.strip() for name in next(csv.reader([lines[0][1]]))]
    mistakes = _header_mistakes(header, path)
    if mistakes:
        raise DataError(mistakes)
    kept = {i: name for i, name in enumerate(header) if name in COLUMNS}
    values: dict[str, list[float]] = {name: [] for name in kept.values()}
    for number, line in lines[1:]:
        cells = next(csv.reader([line]))
        where = f"{path}:{number}"
        if len(cells) != len(header):
            rule = f"the header has {len(header)} columns, this line {len(cells)}"
            mistakes.append(Mistake(where, line, rule, "Give each run a value, or an empty one, a column."))
            continue
        for i, name in kept.items():
            value, mistake = _read(cells[i].strip(), name, where)
            values[name].append(value)
            mistakes += [mistake] if mistake else []
    if mistakes:
        raise DataError(mistakes[:20])
    columns = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    return Runs(path, with_sparsity(columns), tuple(name for name in header if name not in COLUMNS))


def with_sparsity(columns: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the columns, with a missing ``sparsity`` computed from ``num_experts`` and ``top_k``."""
    found = dict(columns)
    if "sparsity" not in found and {"num_experts", "top_k"} <= found.keys():
        found["sparsity"] = 1 - found["top_k"] / found["num_experts"]
    return found


def _header_mistakes(header: Sequence[str], path: str) -> list[Mistake]:
    twice = sorted({name for name in header if header.count(name) > 1})
    mistakes = [
        Mistake(path, name, "two columns have this name", "Rename or remove one of them.") for name in twice
    ]
    if not COLUMNS.keys() & set(header):
        remedy = f"Name the columns {', '.join(COLUMNS)}, as far as they are known."
        mistakes.append(Mistake(path, ",".join(header), "the first line names no known column", remedy))
    return mistakes


def _read(cell: str, name: str, where: str) -> tuple[float, Mistake | None]:
    """Returns the value of a cell; empty is NaN, which `select` rejects in the columns that a law reads."""
    given: Any = cell
    if not cell:
        return math.nan, None
    try:
        given = float(cell)
    except ValueError:
        rule = f"{name} is no number"
        return math.nan, Mistake(where, cell, rule, "Write digits, such as 1.3e9, or leave it empty.")
    broken = COLUMNS[name].rule_broken(given)
    if broken is None:
        return float(given), None
    remedy = f"{name}: {COLUMNS[name].meaning}. Correct it, or remove the run."
    return math.nan, Mistake(where, cell, f"{name}: {broken}", remedy)
