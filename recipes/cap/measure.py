"""Measures one system at one batch size, and puts the figures together.

Letters: B sequences, S tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.bench.timing import interleave, median_ratio, summarise
from moe.accounting.bytes import cache_bytes
from moe.accounting.passes import decode_batch, prefill_batch
from moe.accounting.utilisation import Machine
from moe.errors import ModelError
from recipes.cap.cost import Rates, cost_figures
from recipes.cap.decode import Rollout, roll_out
from recipes.cap.efficiency import efficiency
from recipes.cap.loading import System
from recipes.cap.phases import phase_figures, unmeasured_phase
from recipes.runtime.machine_memory import is_out_of_memory
from recipes.tracking.meters import EnergyMeter, MemoryMeter, MemorySampler, Reading

_WARM_UP_TOKENS = 3


@dataclass(frozen=True)
class Workload:
    """Workload that every system runs.

    Attributes:
        batch_sizes: Sequences at once.
        prompt: Tokens of a prompt.
        new: Tokens written per sequence.
        rounds: Timed repetitions.
        trace: If True experts are watched.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt: int = 128
    new: int = 32
    rounds: int = 3
    trace: bool = True


def measure_point(
    system: System, prompt_BS: Tensor, work: Workload, machine: Machine, rates: Rates
) -> dict[str, Any]:
    """Measures all figures of one batch size; None for those that could not be measured.

    Args:
        system: The model.
        prompt_BS: Prompts of this batch size.
        work: Lengths and rounds.
        machine: Its peaks.
        rates: Costs of an hour.

    Raises:
        ModelError: The batch that ran was not the one asked for.
    """
    B, S = prompt_BS.shape
    point: dict[str, Any] = {"batch_size": B, "prompt": S, "new": work.new, "rounds": work.rounds}
    memory, energy = MemoryMeter(system.device), EnergyMeter(system.device)
    held = MemorySampler(system.device)
    prompt_BS = prompt_BS.to(system.device)
    sites = system.sites if work.trace else None
    memory.start()
    try:
        roll_out(system.model, prompt_BS, min(work.new, _WARM_UP_TOKENS), sites)
        energy.start()
        with held:
            runs = [roll_out(system.model, prompt_BS, work.new, sites) for _ in range(work.rounds)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise _refused(system, error) from error
        return point | unmeasured_point(rates, "out of memory")
    joules, elapsed = energy.read()
    for run in runs:
        _check_run(run, B, S + work.new - 1, system)
    decoded = [decode_batch(B, S + i + 1) for i in range(work.new - 1)]
    point |= {
        "reason": None,
        "reached_batch_size": B,
        **_speeds(runs, B),
        "prefill": phase_figures(system, runs, slice(0, 1), [prefill_batch(B, S)], machine),
        "decode": phase_figures(system, runs, slice(1, None), decoded, machine),
        "cache": _cache(system, runs[0], B, S + work.new - 1),
        "memory": _reading(memory.read(), "peak_bytes"),
        "energy": _energy(joules, elapsed, B * work.new * work.rounds),
        "cost": cost_figures(rates, _written(runs, B), _watts(joules, elapsed)),
    }
    return point | {"efficientllm": efficiency(point, held.read(), held.total, machine.flops)}


def _refused(system: System, error: RuntimeError) -> Exception:
    """Turns the refusal of a shape by grouped products into a user's error; returns others unchanged."""
    way = getattr(system.model.config, "_experts_implementation", None)
    if way in (None, "eager") or not any(site.kind == "indices" for site in system.sites):
        return error
    rule = f"the model does not run with it ({str(error).strip().splitlines()[0]})"
    return ModelError.one("--backend", way, rule, "Give --backend eager.")


def unmeasured_point(rates: Rates, reason: str) -> dict[str, Any]:
    """Returns the keys of a point without their values."""
    point: dict[str, Any] = {
        "reason": reason,
        "reached_batch_size": None,
        **dict.fromkeys(("ttft_s", "tpot_s", "request_s", "tokens_per_s")),
        "prefill": unmeasured_phase(),
        "decode": unmeasured_phase(),
        "cache": dict.fromkeys(("held_bytes", "counted_bytes")),
        "memory": {"peak_bytes": None, "detail": reason},
        "energy": {"joules": None, "joules_per_token": None, "watts": None, "detail": reason},
        "cost": cost_figures(rates, None, None),
    }
    return point | {"efficientllm": efficiency(point, Reading(None, reason), None, None)}


def _check_run(run: Rollout, sequences: int, length: int, system: System) -> None:
    """Checks that the requested batch ran in every pass, to its full length."""
    reached = set(run.sequences)
    if reached != {sequences}:
        rule = f"passes ran with batches of {sorted(reached)}"
        raise ModelError.one("--batch-sizes", sequences, rule, f"Look into {system.source.given}.")
    if run.cache_length not in (None, length):
        rule = f"the cache holds {run.cache_length} tokens per sequence after {length}"
        remedy = "Its cache is of a kind not known here."
        raise ModelError.one("FOLDER", str(system.source.given), rule, remedy)


def spread_of(values: Sequence[float]) -> dict[str, float]:
    timing = summarise(list(values))
    return {"mean": statistics.fmean(values), "median": timing.median, "p10": timing.p10, "p90": timing.p90}


def _speeds(runs: Sequence[Rollout], sequences: int) -> dict[str, Any]:
    """Returns time to the first token, time per further token, time per request, and tokens/s over all."""
    return {
        "ttft_s": spread_of([run.seconds[0] for run in runs]),
        "tpot_s": spread_of([seconds for run in runs for seconds in run.seconds[1:]]),
        "request_s": spread_of([sum(run.seconds) for run in runs]),
        "tokens_per_s": _written(runs, sequences),
    }


def _written(runs: Sequence[Rollout], sequences: int) -> float:
    """Returns tokens/s, prefill in the time."""
    return sequences * sum(len(run.seconds) for run in runs) / sum(sum(run.seconds) for run in runs)


def _cache(system: System, run: Rollout, sequences: int, length: int) -> dict[str, Any]:
    """Returns the bytes of the cache, as held and as counted by the accounting."""
    counted = None
    if system.shape is not None:
        counted = cache_bytes(system.shape, [length] * sequences, system.bits)
    return {"held_bytes": run.cache_bytes, "counted_bytes": counted}


def _reading(reading: Reading, key: str) -> dict[str, Any]:
    return {key: reading.value, "detail": reading.detail}


def _energy(joules: Reading, elapsed: float, tokens: int) -> dict[str, Any]:
    """Returns the energy of all timed rounds, prefill included, also per written token."""
    each = None if joules.value is None else joules.value / tokens
    watts = _watts(joules, elapsed)
    return {"joules": joules.value, "joules_per_token": each, "watts": watts, "detail": joules.detail}


def _watts(joules: Reading, elapsed: float) -> float | None:
    return None if joules.value is None else joules.value / elapsed


def measure_overhead(
    system: System, prompt_BS: Tensor, new: int, rounds: int, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any] | None:
    """Measures the overhead of watching per token: rollouts with and without it, interleaved.

    Returns:
        Medians of both, and the median of their ratios round by round with its spread; None for a model
        without MoE layers.
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
