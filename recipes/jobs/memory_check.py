"""Says before a model is made what its training will take on this machine, and refuses what cannot fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from moe.errors import ConfigError, Mistake, UserError
from moe.upcycle import upcycle_method
from recipes.config.sections.export_config import ExportConfig
from recipes.engines import engine_classes
from recipes.models.hf.deferred_init import CheckpointWeights
from recipes.models.lora_model import add_low_rank
from recipes.runtime.machine_memory import free_and_total_bytes
from recipes.runtime.ranks import Ranks
from recipes.training.memory_forecast import MemoryForecast, Passes, forecast, free_device_bytes, gib
from recipes.upcycling.convert.moe_plan import open_dense, plan_moe, request_of
from recipes.upcycling.sharded.sharded_models import dense_model, moe_model

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
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
    config = run.config
    found = _forecast(config, run.engine.world_size, model)
    machine = _machine(run)
    params = sum(p.numel() for p in model.module.parameters())
    copy = min(4.0 * params, config.section(ExportConfig).memory_gib * 2**30)
    for line in _lines(run.name, found, machine, copy):
        run.log(line)
    if mistake := _refusal(found, machine):
        raise ConfigError([mistake])


def check_memory(config: RunConfig, world_size: int) -> list[Mistake]:
    """Checks on a CPU, before anything is made, that this machine has room for its ranks' MoE model.

    A method whose experts follow from statistics of text cuts up the dense networks: then the dense model's
    weights are what is counted. A GPU is asked once the run has opened it, by `foresee_memory`.

    Args:
        config: The run, whose other checks have passed; without a dense checkpoint nothing is checked.
        world_size: Number of ranks.
    """
    if config.dense is None or config.engine.device_type() != "cpu":
        return []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    held = psutil.Process().memory_info().rss
    machine = Machine(local, free_and_total_bytes()[0], held * local, "this machine")
    try:
        model = _shape(config, Path(config.dense).expanduser())
    except UserError as error:
        return list(error.mistakes)
    mistake = _refusal(_forecast(config, world_size, model), machine)
    return [] if mistake is None else [mistake]


def _shape(config: RunConfig, dense: Path) -> HFModel:
    """Returns what will be trained, without memory."""
    if upcycle_method(config.upcycle).statistics:
        trust = config.trust_remote_code
        return dense_model(open_dense(dense, trust_remote_code=trust), trust_remote_code=trust)
    plan = plan_moe(request_of(config, dense), reads=False)
    model = moe_model(plan, config.experts.backend, CheckpointWeights())
    add_low_rank(model, config.experts.lora, config.seed)
    return model


def _forecast(config: RunConfig, world_size: int, model: HFModel) -> MemoryForecast:
    engine = engine_classes()[config.engine.name]
    ranks = max(1, world_size // config.engine.model_parallel_size)
    tokens = config.train.micro_size(ranks) * config.data.seq_len
    several = config.train.num_micro_batches(ranks) > 1
    passes = Passes(
        tokens,
        2 if config.engine.precision == "bf16" else 4,
        config.engine.activation_checkpointing,
        several,
        config.engine.device_type(),
    )
    shares = engine.held_shares(config.engine, world_size, accumulates=several)
    return forecast(model, config.optim, shares, passes)


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


def _refusal(found: MemoryForecast, machine: Machine) -> Mistake | None:
    if found.fixed * machine.ranks <= machine.free + machine.held:
        return None
    need = gib(found.fixed * machine.ranks)
    rule = (
        f"weights, gradients and optimizer state of {machine.ranks} ranks need {need} GiB, and "
        f"{gib(machine.free)} GiB are free on {machine.place}"
    )
    remedy = (
        "Start ranks on more machines, set a smaller upcycle.num_experts or fewer upcycle.layers, or train "
        "low-rank factors: experts.lora.rank=8."
    )
    return Mistake("memory", f"{gib(found.fixed)} GiB a rank", rule, remedy)
