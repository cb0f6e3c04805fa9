"""Schedule of K that the section ``top_k_schedule`` of a run describes, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe.errors import FieldError, Mistake
from moe.routers import router_configs
from moe.routing.top_k_schedule import SparsePhase, TopKSchedule, make_schedule
from recipes.config.schema import RunConfig

if TYPE_CHECKING:
    from recipes.tracking.step_costs import Costs


def schedule_of(config: RunConfig, layers: Sequence[int]) -> TopKSchedule | None:
    """Returns the schedule of a checked config; None where K does not change.

    Args:
        config: Config of the run.
        layers: Indices of the MoE layers in the model, ascending.
    """
    if not config.top_k_schedule or config.train.steps == 0:
        return None
    top_k: int = config.router.top_k  # type: ignore[attr-defined]
    return make_schedule(config.top_k_schedule, layers, top_k, config.train.steps, tokens_per_step(config))


def tokens_per_step(config: RunConfig) -> int:
    """Returns the tokens of a step, over all ranks and micro-batches."""
    return config.train.global_batch_size * config.data.seq_len


def top_k_schedule_identity(config: RunConfig) -> list[Any] | None:
    """Returns the part of the schedule that a resume may not change: K, and the steps at which it changes.

    A share of a run that is given more steps is another step: K would rise again. Tokens stay where they are.
    """
    if not config.top_k_schedule:
        return None
    ends = [phase.end(config.train.steps, tokens_per_step(config)) for phase in config.top_k_schedule]
    return [
        {"until_step": end, "top_k": phase.top_k, "layers": phase.layers}
        for end, phase in zip(ends, config.top_k_schedule, strict=True)
    ]


def describe_phases(schedule: TopKSchedule | None, costs: Sequence[tuple[int, Costs]]) -> list[str]:
    """Describes each phase in a line."""
    return [
        f"from step {phase['first_step']} on {phase['top_k']} experts a token, layer by layer, "
        f"{phase['active_params']:,} active parameters"
        for phase in summarise_phases(schedule, costs)
    ]


def summarise_phases(
    schedule: TopKSchedule | None, costs: Sequence[tuple[int, Costs]]
) -> list[dict[str, Any]]:
    """Returns first step, K by layer from below and cost of a token of each phase, for ``summary.json``."""
    return [
        {
            "first_step": start,
            "top_k": [] if schedule is None else list(schedule.at(start).values()),
            "active_params": cost.active_params,
            "flops_per_token_train": cost.flops_per_token_train,
        }
        for start, cost in costs
    ]


def check_top_k_schedule(config: RunConfig) -> list[Mistake]:
    """Checks that the router can change K to these numbers, and that the phases fit the run."""
    if not config.top_k_schedule:
        return []
    if not config.router.varies_top_k:
        able = ", ".join(name for name, cls in router_configs().items() if cls.varies_top_k)
        rule = "this router cannot change its number of experts between steps"
        remedy = f"Leave top_k_schedule out, or choose a router of: {able}."
        return [Mistake("router.name", config.router.name, rule, remedy)]
    return [*_numbers(config), *_falls(config), *_ends(config)]


def check_top_k_schedule_layers(config: RunConfig, num_layers: int) -> list[Mistake]:
    """Checks that phases name no more layers than there are MoE layers."""
    return [
        Mistake(
            f"top_k_schedule.{place}.{'layers' if isinstance(phase.top_k, int) else 'top_k'}",
            phase.layers if isinstance(phase.top_k, int) else phase.top_k,
            f"it names {phase.num_listed} layers, and {num_layers} become MoE layers",
            f"Name {num_layers} at most.",
        )
        for place, phase in enumerate(config.top_k_schedule)
        if phase.num_listed > num_layers
    ]


def _numbers(config: RunConfig) -> list[Mistake]:
    """Checks each K by the router's own rules."""
    mistakes = []
    for place, phase in enumerate(config.top_k_schedule):
        for top_k in sorted({phase.top_k} if isinstance(phase.top_k, int) else set(phase.top_k)):
            if found := _check_number(config, top_k):
                path = f"top_k_schedule.{place}.top_k"
                mistakes.append(dataclasses.replace(found, path=path, value=top_k))
    return mistakes


def _check_number(config: RunConfig, top_k: int) -> Mistake | None:
    """Returns the mistake of the router's config with this K; None when there is none."""
    try:
        changed = dataclasses.replace(config.router, top_k=top_k)  # type: ignore[call-arg]
    except FieldError as error:
        return error.mistakes[0]
    return changed.check(config.upcycle.num_experts)


def _falls(config: RunConfig) -> list[Mistake]:
    """Checks that K falls from phase to phase and to the router's own, in every layer."""
    top_k: int = config.router.top_k  # type: ignore[attr-defined]
    named = max(phase.num_listed for phase in config.top_k_schedule)
    last = SparsePhase(until=0.5, top_k=top_k)
    mistakes = []
    for place, (phase, follows) in enumerate(
        zip(config.top_k_schedule, [*config.top_k_schedule[1:], last], strict=True)
    ):
        # Layers beyond those that are named have one number in each phase.
        rises = [p for p in range(named + 1) if phase.experts(p, top_k) < follows.experts(p, top_k)]
        if rises:
            rule = f"in layer {rises[0]} from below fewer experts would be followed by more"
            remedy = f"K falls over the phases, to router.top_k={top_k} behind the last."
            mistakes.append(Mistake(f"top_k_schedule.{place}.top_k", phase.top_k, rule, remedy))
    return mistakes


def _ends(config: RunConfig) -> list[Mistake]:
    """Checks that every phase has a step, and that one is left behind the last."""
    steps, tokens = config.train.steps, tokens_per_step(config)
    if steps == 0:
        return []
    mistakes, before = [], 0
    for place, phase in enumerate(config.top_k_schedule):
        end = phase.end(steps, tokens)
        path = f"top_k_schedule.{place}.until"
        if end <= before:
            rule = f"it ends at step {end}, and the phase before it at step {before}"
            mistakes.append(Mistake(path, phase.until, rule, "Order the phases, each later than the last."))
        elif end >= steps:
            rule = f"it ends at step {end}, and the run has {steps} steps of {tokens} tokens"
            remedy = "The router's own top_k needs a step at least: end it earlier, or raise train.steps."
            mistakes.append(Mistake(path, phase.until, rule, remedy))
        before = max(before, end)
    return mistakes
