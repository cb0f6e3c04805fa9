"""Figures of passes of one kind, prefill or decode: utilisations, and the bytes and FLOPs behind them."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe.accounting.bytes import BitWidths, StepBytes, step_bytes
from moe.accounting.distinct import DistinctExperts, estimated_distinct, touched_share
from moe.accounting.layers import ModelShape
from moe.accounting.passes import Batch, pass_flops
from moe.accounting.tiers import PARTS, tier_uses
from moe.accounting.utilisation import Machine, Pass, utilisations
from recipes.cap.loading import Known

UTILISATIONS = ("s_mbu", "s_mbu_strict", "mbu", "s_mfu", "s_mfu_strict", "mfu")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The passes of one batch of sequences, the prefill first.

    Attributes:
        seconds: Seconds of every pass.
        distinct: Experts of every pass; None where they are not known.
    """

    seconds: tuple[float, ...]
    distinct: tuple[DistinctExperts, ...] | None


PHASE_KEYS = (
    "passes",
    "seconds",
    "tokens_per_s",
    *UTILISATIONS,
    "utilisation_reason",
    "distinct",
    "bytes",
    "tiers",
    "flops",
    "bytes_per_s",
    "flops_per_s",
    "flops_per_byte",
    "warnings",
)


def phase_figures(
    known: Known, runs: Sequence[Passes], part: slice, batches: Sequence[Batch], machine: Machine
) -> dict[str, Any]:
    """Computes the figures of all prefill passes, or of all decode passes, as ratios of sums.

    Args:
        known: Facts of the accounting.
        runs: Rounds.
        part: Passes of a round.
        batches: Batches of these passes.
        machine: Its peaks.
    """
    seconds = [value for run in runs for value in run.seconds[part]]
    distinct: list[DistinctExperts | None] = []
    for run in runs:
        distinct += [None] * len(batches) if run.distinct is None else list(run.distinct[part])
    each = [batch for _ in runs for batch in batches]
    took = sum(seconds)
    figures: dict[str, Any] = dict.fromkeys(PHASE_KEYS)
    figures |= {
        "passes": len(seconds),
        "seconds": took,
        "tokens_per_s": sum(batch.tokens for batch in each) / took,
        "distinct": _distinct(known.shape, distinct, [batch.tokens for batch in batches]),
        "warnings": [],
    }
    if known.shape is None:
        return figures | {"utilisation_reason": known.shape_reason}
    passes = [Pass(*row) for row in zip(each, seconds, distinct, strict=True)]
    figures |= _use(known.shape, passes, machine, known.bits)
    if machine.tiers and figures["bytes"] is not None:
        amounts = {part: figures["bytes"][part] for part in PARTS}
        uses = tier_uses(StepBytes(**amounts), machine.tiers, took)
        figures["tiers"] = [asdict(use) for use in uses]
    return figures


def _use(shape: ModelShape, passes: Sequence[Pass], machine: Machine, bits: BitWidths) -> dict[str, Any]:
    """Computes utilisations, and the bytes and FLOPs behind them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = utilisations(shape, passes, machine, bits)
    flops = sum(pass_flops(shape, one.batch) for one in passes)
    took = sum(one.seconds or 0.0 for one in passes)
    use: dict[str, Any] = {name: getattr(found, name) for name in UTILISATIONS}
    use |= {
        "utilisation_reason": _missing(machine, passes),
        "flops": flops,
        "flops_per_s": flops / took,
        # warnings of MBU and MFU repeat S-MBU's, or come from counting every expert
        "warnings": sorted({text for one in caught if (text := str(one.message)).startswith("S-")}),
    }
    traced = [one for one in passes if one.distinct is not None]
    if len(traced) < len(passes):
        return use
    total = StepBytes()
    for one in traced:
        assert one.distinct is not None
        total += step_bytes(shape, one.batch, one.distinct.per_layer, bits)
    return use | {
        "bytes": {**asdict(total), "strict": total.strict, "complete": total.complete},
        "bytes_per_s": total.complete / took,
        "flops_per_byte": flops / total.complete,
    }


def _missing(machine: Machine, passes: Sequence[Pass]) -> str | None:
    """Returns the reason why some utilisation is None; None where all are known."""
    lacks = [
        words
        for words, value in (("bandwidth", machine.bytes_per_s), ("FLOP/s", machine.flops))
        if value is None
    ]
    reasons = [f"the peak {' and '.join(lacks)} is not known"] if lacks else []
    if any(one.distinct is None for one in passes):
        reasons.append("experts were not watched")
    return "; ".join(reasons) or None


def unmeasured_phase(reason: str | None = None) -> dict[str, Any]:
    """Returns the keys of a phase without their values."""
    return dict.fromkeys(PHASE_KEYS) | {"utilisation_reason": reason, "warnings": []}


def _bound(shape: ModelShape, tokens: Sequence[int], networks: int) -> float:
    """Returns the mean uniform bound of the passes over the same MoE layers as the mean."""
    by_pass = [estimated_distinct(shape, count).per_layer for count in tokens]
    return statistics.fmean(statistics.fmean(each[:networks] or each) for each in by_pass)


def _distinct(
    shape: ModelShape | None, distinct: Sequence[DistinctExperts | None], tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Summarises the distinct experts per layer and pass; None where nothing was watched."""
    found = [one for one in distinct if one is not None and one.per_layer]
    if not found or len(found) < len(distinct):
        return None
    layers = list(zip(*(one.per_layer for one in found), strict=True))
    means = [statistics.fmean(layer) for layer in layers]
    networks = len(means) if shape is None else len(shape.moe)
    return {
        "source": found[0].source,
        # heads that are experts come behind the networks, and are fewer
        "mean": statistics.fmean(means[:networks] or means),
        "heads_mean": statistics.fmean(means[networks:]) if networks < len(means) else None,
        "per_layer": means,
        "least": min(min(layer) for layer in layers),
        "most": max(max(layer) for layer in layers),
        "uniform_bound": None if shape is None else _bound(shape, tokens, networks),
        "parameters_touched": None if shape is None else touched_share(shape, means),
    }
