"""Measures one system at one batch size, and puts the figures together.

Letters: B sequences, S tokens.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.timing import interleave, median_ratio, summarise
from moe.accounting.bytes import BitWidths, StepBytes, cache_bytes, step_bytes
from moe.accounting.distinct import DistinctExperts, estimated_distinct, touched_share
from moe.accounting.layers import ModelShape
from moe.accounting.passes import Batch, decode_batch, pass_flops, prefill_batch
from moe.accounting.utilisation import Machine, Pass, utilisations
from moe.errors import HostError
from recipes.cap.cost import Rates, cost_figures
from recipes.cap.decode import Rollout, roll_out
from recipes.cap.loading import System
from recipes.cap.meters import EnergyMeter, MemoryMeter, Reading

_WARM_UP_TOKENS = 3
UTILISATIONS = ("s_mbu", "s_mbu_strict", "mbu", "s_mfu", "s_mfu_strict", "mfu")


@dataclass(frozen=True)
class Workload:
    """What every system is given.

    Attributes:
        batch_sizes: Sequences at once.
        prompt: Tokens of a prompt.
        new: Tokens written a sequence.
        rounds: Timed repetitions.
        trace: Whether experts are watched.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt: int = 128
    new: int = 32
    rounds: int = 3
    trace: bool = True


def measure_point(
    system: System, prompt_BS: Tensor, work: Workload, machine: Machine, rates: Rates
) -> dict[str, Any]:
    """All figures of one batch size; None for what could not be measured.

    Args:
        system: The model.
        prompt_BS: Prompts of this batch size.
        work: How long and how often.
        machine: Its peaks.
        rates: What its hours cost.

    Raises:
        HostError: The batch that ran was not the one asked for.
    """
    B, S = prompt_BS.shape
    point: dict[str, Any] = {"batch_size": B, "prompt": S, "new": work.new, "rounds": work.rounds}
    memory, energy = MemoryMeter(system.device), EnergyMeter(system.device)
    prompt_BS = prompt_BS.to(system.device)
    sites = system.sites if work.trace else None
    memory.start()
    try:
        roll_out(system.model, prompt_BS, min(work.new, _WARM_UP_TOKENS), sites)
        energy.start()
        runs = [roll_out(system.model, prompt_BS, work.new, sites) for _ in range(work.rounds)]
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return {**point, **_unmeasured(rates, "out of memory")}
    joules, elapsed = energy.read()
    for run in runs:
        _check_run(run, B, S + work.new - 1, system)
    return {
        **point,
        "reason": None,
        "reached_batch_size": B,
        **_speeds(runs, B, S),
        "prefill": _phase(system, runs, slice(0, 1), [prefill_batch(B, S)], machine),
        "decode": _phase(
            system, runs, slice(1, None), [decode_batch(B, S + i + 1) for i in range(work.new - 1)], machine
        ),
        "cache": _cache(system, runs[0], B, S + work.new - 1),
        "memory": _reading(memory.read(), "peak_bytes"),
        "energy": _energy(joules, elapsed, B * work.new * work.rounds),
        "cost": _cost(rates, runs, B, joules, elapsed),
    }


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _unmeasured(rates: Rates, reason: str) -> dict[str, Any]:
    """The keys of a point without their values."""
    phase = dict.fromkeys(_PHASE_KEYS)
    return {
        "reason": reason,
        "reached_batch_size": None,
        **dict.fromkeys(("ttft_s", "tpot_s", "tokens_per_s")),
        "prefill": {**phase, "warnings": []},
        "decode": {**phase, "warnings": []},
        "cache": dict.fromkeys(("held_bytes", "counted_bytes")),
        "memory": {"peak_bytes": None, "detail": reason},
        "energy": {"joules": None, "joules_per_token": None, "detail": reason},
        "cost": cost_figures(rates, None, None),
    }


def _check_run(run: Rollout, sequences: int, length: int, system: System) -> None:
    """Whether the batch that was asked for ran in every pass, to its full length."""
    reached = set(run.sequences)
    if reached != {sequences}:
        rule = f"passes ran with batches of {sorted(reached)}"
        raise HostError.one("--batch-sizes", sequences, rule, f"Look into the model of {system.folder}.")
    if run.cache_length not in (None, length):
        rule = f"the cache holds {run.cache_length} tokens a sequence after {length}"
        raise HostError.one("FOLDER", str(system.folder), rule, "Its cache is of a kind not known here.")


def _spread(values: Sequence[float]) -> dict[str, float]:
    timing = summarise(list(values))
    return {"mean": statistics.fmean(values), "median": timing.median, "p10": timing.p10, "p90": timing.p90}


def _speeds(runs: Sequence[Rollout], sequences: int, prompt: int) -> dict[str, Any]:
    """Time to the first token, time of every further one, and tokens/s over both."""
    first = [run.seconds[0] for run in runs]
    later = [seconds for run in runs for seconds in run.seconds[1:]]
    whole = sum(first) + sum(later)
    return {
        "ttft_s": _spread(first),
        "tpot_s": _spread(later),
        "tokens_per_s": sequences * sum(len(run.seconds) for run in runs) / whole,
    }


_PHASE_KEYS = (
    "passes",
    "seconds",
    "tokens_per_s",
    *UTILISATIONS,
    "utilisation_reason",
    "distinct",
    "bytes",
    "flops",
    "bytes_per_s",
    "flops_per_s",
    "flops_per_byte",
    "warnings",
)


def _phase(
    system: System, runs: Sequence[Rollout], part: slice, batches: Sequence[Batch], machine: Machine
) -> dict[str, Any]:
    """Figures of all prefill passes, or of all decode passes: ratios of sums."""
    seconds = [value for run in runs for value in run.seconds[part]]
    distinct: list[DistinctExperts | None] = []
    for run in runs:
        distinct += [None] * len(batches) if run.distinct is None else list(run.distinct[part])
    each = [batch for _ in runs for batch in batches]
    took = sum(seconds)
    figures: dict[str, Any] = dict.fromkeys(_PHASE_KEYS)
    figures |= {
        "passes": len(seconds),
        "seconds": took,
        "tokens_per_s": sum(batch.tokens for batch in each) / took,
        "distinct": _distinct(system.shape, distinct, each[0].tokens),
        "warnings": [],
    }
    if system.shape is None:
        return figures | {"utilisation_reason": system.shape_reason}
    passes = [Pass(*row) for row in zip(each, seconds, distinct, strict=True)]
    return figures | _use(system.shape, passes, machine, system.bits)


def _use(shape: ModelShape, passes: Sequence[Pass], machine: Machine, bits: BitWidths) -> dict[str, Any]:
    """Utilisations, and the bytes and FLOPs behind them."""
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
        "warnings": sorted({str(warning.message) for warning in caught}),
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
    """Why some utilisation is None, in words; None where none is."""
    lacks = [
        words
        for words, value in (("bandwidth", machine.bytes_per_s), ("FLOP/s", machine.flops))
        if value is None
    ]
    reasons = [f"the peak {' and '.join(lacks)} is not known"] if lacks else []
    if any(one.distinct is None for one in passes):
        reasons.append("experts were not watched")
    return "; ".join(reasons) or None


def _distinct(
    shape: ModelShape | None, distinct: Sequence[DistinctExperts | None], tokens: int
) -> dict[str, Any] | None:
    """Different experts a layer and pass; None where nothing was watched or there is no mixture."""
    known = [one for one in distinct if one is not None and one.per_layer]
    if not known or len(known) < len(distinct):
        return None
    layers = list(zip(*(one.per_layer for one in known), strict=True))
    means = [statistics.fmean(layer) for layer in layers]
    return {
        "source": known[0].source,
        "mean": statistics.fmean(means),
        "per_layer": means,
        "least": min(min(layer) for layer in layers),
        "most": max(max(layer) for layer in layers),
        "uniform_bound": None if shape is None else estimated_distinct(shape, tokens).mean,
        "parameters_touched": None if shape is None else touched_share(shape, means),
    }


def _cache(system: System, run: Rollout, sequences: int, length: int) -> dict[str, Any]:
    """Bytes of the cache: as it was held, and as the accounting counts it."""
    counted = None
    if system.shape is not None:
        counted = cache_bytes(system.shape, [length] * sequences, system.bits)
    return {"held_bytes": run.cache_bytes, "counted_bytes": counted}


def _reading(reading: Reading, key: str) -> dict[str, Any]:
    return {key: reading.value, "detail": reading.detail}


def _energy(joules: Reading, elapsed: float, tokens: int) -> dict[str, Any]:
    """Of all timed rounds, prefill included; a token is one that was written."""
    each = None if joules.value is None else joules.value / tokens
    return {"joules": joules.value, "joules_per_token": each, "detail": joules.detail}


def _cost(
    rates: Rates, runs: Sequence[Rollout], sequences: int, joules: Reading, elapsed: float
) -> dict[str, Any]:
    took = sum(sum(run.seconds) for run in runs)
    written = sequences * sum(len(run.seconds) for run in runs)
    watts = None if joules.value is None else joules.value / elapsed
    return cost_figures(rates, written / took, watts)


def measure_overhead(
    system: System, prompt_BS: Tensor, new: int, rounds: int, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any] | None:
    """What watching adds to a token's time: rollouts with and without it, interleaved.

    Returns:
        Medians of both, and the median of their ratios round by round with its spread; None for a model
        without mixtures.
    """
    if not system.sites:
        return None
    prompt_BS = prompt_BS.to(system.device)
    seconds: dict[str, list[float]] = {"with": [], "without": []}

    def run(name: str) -> None:
        sites = system.sites if name == "with" else None
        passes = roll_out(system.model, prompt_BS, new, sites).seconds[1:]
        seconds[name].append(statistics.median(passes))

    interleave({"with": lambda: run("with"), "without": lambda: run("without")}, rounds, 1)
    # the first of each was to warm up
    timed = {name: values[1:] for name, values in seconds.items()}
    ratio = median_ratio(timed["with"], timed["without"])
    log(f"{system.name}: watching takes {ratio.median - 1:+.1%} of TPOT")
    return {
        "batch_size": prompt_BS.shape[0],
        "rounds": rounds,
        "tpot_with_s": statistics.median(timed["with"]),
        "tpot_without_s": statistics.median(timed["without"]),
        "ratio": {"median": ratio.median, "p10": ratio.p10, "p90": ratio.p90},
    }
