"""Time, memory and energy that a run used, and its shares of the peaks, for ``summary.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.accounting.device_peaks import peak_for
from recipes.runtime.clock import steady_time
from recipes.runtime.run_file import METRICS_FILE
from recipes.tracking.ceilings import Ceiling, Peaks, bandwidth_for, unless_short_of_memory
from recipes.tracking.metrics_log import Metric, read_rows, reduce_metrics
from recipes.tracking.step_costs import StepCosts
from recipes.tracking.training_figures import summarise_stage
from recipes.training.model_costs import expert_readers, local_update_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from moe.accounting.training import StepModel
    from recipes.engines.base import Engine, TrainModule
    from recipes.jobs.base import Session
    from recipes.models.hf.hf_model import HFModel
    from recipes.tracking.results import Results
    from recipes.tracking.run_meters import RunMeters

_JOULES_PER_KWH = 3.6e6
_CUT = "ranks cut the model between them, and who reads which part is not counted"


def find_peaks(engine: Engine[Any], meters: RunMeters | None) -> Peaks:
    """Returns the peaks of a rank's device; arrays of the measurement do not count as the run's memory."""
    device = engine.device
    flops = unless_short_of_memory(lambda: peak_for(device, engine.compute_dtype))
    with contextlib.nullcontext() if meters is None else meters.aside():
        return Peaks(flops, unless_short_of_memory(lambda: bandwidth_for(device)))


def step_costs(
    engine: Engine[Any],
    model: HFModel,
    cost_model: StepModel,
    train_module: TrainModule,
    bandwidth: Ceiling,
) -> StepCosts:
    """Computes the constants of a stage's figures; all ranks call it together.

    Args:
        engine: The open engine.
        model: The model.
        cost_model: Its shape, taken before it was sharded over the ranks.
        train_module: The model after that.
        bandwidth: Memory bandwidth of a rank's device.
    """
    local = {"update": Metric(local_update_bytes(train_module), "sum")}
    moved = reduce_metrics(local, engine.data_group)["update"]
    return StepCosts(
        model=dataclasses.replace(cost_model, update_bytes=moved),
        weight_size=engine.compute_dtype.itemsize,
        peak_bytes_per_s=bandwidth.value,
        readers=expert_readers(model),
        uncounted=None if engine.data_ranks == engine.world_size else _CUT,
        counts_slots=not any(layer.router.config.mixes_tokens for layer in model.routed_layers()),
    )


def put_training(run_dir: Path, results: Results, stage: str, missing: Mapping[str, str]) -> None:
    """Writes the figures of a stage as far as it has come, with the reasons of those that are null."""
    rows = [row for row in read_rows(run_dir / METRICS_FILE) if row.get("stage") == stage]
    figures = summarise_stage(rows)
    reasons = {name: reason for name, reason in missing.items() if figures.get(name) is None}
    stages = results.content.setdefault("training", {})
    stages[stage] = figures | {"missing": reasons}
    results.write()


def account(session: Session, results: Results) -> None:
    """Adds time, memory and energy of this process to those of earlier processes of the run."""
    engine, meters = session.engine, session.loop.meters
    peak = float(peak_memory_bytes(engine.device))
    joules, reason = math.nan, "nobody has measured it"
    if meters is not None:
        joules = meters.total_joules()
        peak = max(peak, meters.peak_bytes)
        reason = meters.reasons.get("energy_j", "another rank could not measure it")
    used = reduce_metrics({"bytes": Metric(peak, "sum"), "joules": Metric(joules, "sum")}, engine.data_group)
    before = results.content.get("peak_memory_bytes", 0)
    results.content["peak_memory_bytes"] = max(before, int(used["bytes"]))
    _put_energy(results, used["joules"], reason)
    results.add_time("total_s", steady_time() - session.started)
    if session.ledger is not None:
        results.content["goodput"] = session.ledger.figures(session.ledger.now(), session.loop.spent)
    results.write()


def _put_energy(results: Results, joules: float, reason: str) -> None:
    """Adds the energy of the devices while this process was open; null once a part of it is not known."""
    before = results.content.get("energy")
    if not math.isfinite(joules):
        results.content["energy"] = {"kwh": None, "reason": reason}
    elif before is None or before["kwh"] is not None:
        earlier = 0.0 if before is None else before["kwh"]
        results.content["energy"] = {"kwh": earlier + joules / _JOULES_PER_KWH}
