"""Conversion of a fit to plain values for JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe.errors import DataError, Mistake
from moe.scaling_laws import laws
from moe.scaling_laws.fit import Fit
from moe.scaling_laws.ways import Curve, fitted_curve


def fit_record(fit: Fit, source: str) -> dict[str, Any]:
    """Converts a fit, except its residuals, to plain values.

    Args:
        fit: The fit.
        source: Origin of its runs.
    """
    return {
        "law": fit.law.name,
        "source": fit.law.source,
        "formula": fit.law.formula,
        "runs": {"from": source, "count": fit.count},
        "coefficients": dict(fit.coefficients),
        "intervals": None if fit.intervals is None else {k: list(v) for k, v in fit.intervals.items()},
        "level": fit.level,
        "ranges": {name: list(ends) for name, ends in fit.ranges.items()},
        "rmse_log_loss": fit.rmse,
        "held_out_rmse_log_loss": fit.held_out_rmse,
        "objective": fit.objective,
        "agreeing_starts": fit.agreeing_starts,
        "undetermined": dict(fit.undetermined),
        "notes": list(fit.notes),
        "draws": {name: fit.draws[:, i].tolist() for i, name in enumerate(fit.law.names)},
    }


def curve_from_record(record: Any, path: str) -> Curve:
    """Reads the curve from a record made by `fit_record`.

    Args:
        record: The parsed record.
        path: Its origin, for messages.

    Raises:
        DataError: The value is no such record, or is damaged.
    """
    remedy = "Make it with python -m tools.fit_laws RUNS.csv --law NAME --json PATH."
    if not isinstance(record, Mapping) or record.get("law") not in (known := laws()):
        raise DataError.one(path, _short(record), "it is no fit of a law", remedy)
    law = known[record["law"]]
    wanted = set(law.names)
    mistakes = []
    coefficients: Any = record.get("coefficients")
    draws: Any = record.get("draws")
    ranges: Any = record.get("ranges")
    level: Any = record.get("level")
    if not _is_table(coefficients, wanted) or not all(np.ndim(v) == 0 for v in coefficients.values()):
        rule = f"coefficients must hold a number for each of {', '.join(law.names)}"
        mistakes.append(Mistake(path, _short(coefficients), rule, remedy))
    if not _is_table(draws, wanted) or len({np.shape(values) for values in draws.values()}) != 1:
        rule = "draws must hold as many numbers for every coefficient"
        mistakes.append(Mistake(path, _short(draws), rule, remedy))
    if not _is_table(ranges, set(law.inputs)) or any(np.shape(ends) != (2,) for ends in ranges.values()):
        rule = "ranges must hold two numbers for every input"
        mistakes.append(Mistake(path, _short(ranges), rule, remedy))
    if not isinstance(level, float) or not 0 < level < 1:
        mistakes.append(Mistake(path, level, "level must be between 0 and 1", remedy))
    if mistakes:
        raise DataError(mistakes)
    return fitted_curve(
        Fit(
            law=law,
            coefficients=coefficients,
            intervals=None,
            draws=np.array([draws[name] for name in law.names], dtype=np.float64).T,
            level=level,
            ranges={name: (ends[0], ends[1]) for name, ends in ranges.items()},
            count=0,
            rmse=float("nan"),
            held_out_rmse=None,
            objective=float("nan"),
            agreeing_starts=float("nan"),
            residuals=np.empty(0),
            undetermined=record.get("undetermined", {}),
        ),
        path,
    )


def _is_table(value: Any, names: set[str]) -> bool:
    """Returns True if it maps exactly these names to finite numbers or lists of them."""
    if not isinstance(value, Mapping) or set(value) != names:
        return False
    try:
        return all(np.isfinite(np.asarray(v, dtype=np.float64)).all() for v in value.values())
    except (TypeError, ValueError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
