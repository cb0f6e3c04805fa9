"""Says before a model is made what its training will take on this machine, and refuses what cannot fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from moe.errors import ConfigError
from recipes.config.sections.export_config import ExportConfig
from recipes.runtime.machine_memory import free_and_total_bytes
from recipes.runtime.ranks import Ranks
from recipes.training.memory_forecast import MemoryForecast, Passes, forecast, free_device_bytes, gib

if TYPE_CHECKING:
    from recipes.jobs.stage_run import StageRun
    from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class Machine:
    """Fullest machine of a run.

    Attributes:
        ranks: Ranks that share the memory.
        free: Bytes that are free.
        held: Bytes that these ranks hold already, part of which they can use again.
        place: Name of the memory.
    """

    ranks: int
    free: int
    held: int
    place: str


def foresee_memory(run: StageRun, model: HFModel) -> None:
    """Logs what a stage will take; all ranks call it together.

    Args:
        run: The stage.
        model: The model before it is sharded, without memory.

    Raises:
        ConfigError: Weights, gradients and optimizer state alone need more than the machine has.
    """
    engine, config = run.engine, run.config
    tokens = config.train.micro_size(engine.data_ranks) * config.data.seq_len
    several = config.train.num_micro_batches(engine.data_ranks) > 1
    recomputes = config.engine.activation_checkpointing
    passes = Passes(tokens, engine.compute_dtype.itemsize, recomputes, several, engine.device.type)
    shares = engine.held_shares(config.engine, engine.world_size, accumulates=several)
    found = forecast(model, config.optim, shares, passes)
    machine = _machine(run)
    params = sum(p.numel() for p in model.module.parameters())
    copy = min(4.0 * params, config.section(ExportConfig).memory_gib * 2**30)
    for line in _lines(run.name, found, machine, copy):
        run.log(line)
    _refuse(found, machine)


def _machine(run: StageRun) -> Machine:
    """Returns the machine with the least free memory, the same on every rank."""
    device, local = run.engine.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = [free_device_bytes(device, free_and_total_bytes()[0]), psutil.Process().memory_info().rss, local]
    if device.type == "cuda":
        own[1:] = [0, 1]  # each rank has a device of its own
    facts: Sequence[list[int]] = Ranks(None).together("asking for free memory", lambda: own)
    free, held, ranks = min(facts)
    return Machine(ranks, free, held * ranks, "its GPU" if device.type == "cuda" else "this machine")


def _lines(name: str, found: MemoryForecast, machine: Machine, copy: float) -> list[str]:
    need = found.total * machine.ranks
    ranks = "" if machine.ranks == 1 else f" x {machine.ranks} ranks = {gib(need)}"
    lines = [
        f"{name}: memory foreseen, in GiB: {gib(found.total)} a rank{ranks}, of {gib(machine.free)} free on "
        f"{machine.place}: {found.parts()}; then {gib(copy)} on rank 0 to check the export"
    ]
    if need > machine.free >= found.fixed * machine.ranks:
        lines.append(f"{name}: warning: this may not fit. {_advice(found)}")
    return lines


def _advice(found: MemoryForecast) -> str:
    if found.activations + found.logits < found.buffers:
        return "Start more ranks on other machines, or set engine.expert_parallel."
    recompute = "engine.activation_checkpointing=true, or " if found.activations > found.logits else ""
    return f"Set {recompute}a smaller train.micro_batch_size or data.seq_len."


def _refuse(found: MemoryForecast, machine: Machine) -> None:
    if found.fixed * machine.ranks <= machine.free + machine.held:
        return
    need = gib(found.fixed * machine.ranks)
    rule = (
        f"weights, gradients and optimizer state of {machine.ranks} ranks need {need} GiB, and "
        f"{gib(machine.free)} GiB are free on {machine.place}"
    )
    remedy = (
        "Start ranks on more machines, set a smaller upcycle.num_experts or fewer upcycle.layers, or train "
        "low-rank factors: experts.lora.rank=8."
    )
    raise ConfigError.one("memory", f"{gib(found.fixed)} GiB a rank", rule, remedy)
