"""What a run used: time, memory, energy and shares of the peaks, for ``summary.json``."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

from moe.accounting.device_peaks import peak_for
from moe.accounting.training import StepModel
from recipes.engines import TrainModule
from recipes.jobs.base import Session
from recipes.models.hf.hf_model import HFModel
from recipes.tracking.ceilings import Ceiling, Peaks, bandwidth_for
from recipes.tracking.metrics_log import METRICS_FILE, Metric, read_rows, reduce_metrics
from recipes.tracking.results import Results
from recipes.tracking.step_costs import StepCosts
from recipes.tracking.training_figures import summarise_stage
from recipes.training.model_costs import expert_readers, local_update_bytes, peak_memory_bytes

_JOULES_PER_KWH = 3.6e6
_CUT = "ranks cut the model between them, and who reads which part is not counted"


def find_peaks(session: Session) -> Peaks:
    """Of the device of a rank; the arrays of the measurement are not the run's memory."""
    device, meters = session.engine.device, session.loop.meters
    flops = peak_for(device, session.engine.compute_dtype)
    if meters is None:
        return Peaks(flops, bandwidth_for(device))
    with meters.aside():
        return Peaks(flops, bandwidth_for(device))


def step_costs(
    session: Session, model: HFModel, cost_model: StepModel, train_module: TrainModule, bandwidth: Ceiling
) -> StepCosts:
    """What the figures of a leg's steps need; all ranks call it together.

    Args:
        session: The run.
        model: The model.
        model: Its shape, taken before it was spread over the ranks.
        train_module: The model after that.
        bandwidth: Of a rank's device.
    """
    local = {"update": Metric(local_update_bytes(train_module), "sum")}
    moved = reduce_metrics(local, session.engine.data_group)["update"]
    return StepCosts(
        model=dataclasses.replace(cost_model, update_bytes=moved),
        weight_size=session.engine.compute_dtype.itemsize,
        peak_bytes_per_s=bandwidth.value,
        readers=expert_readers(model),
        uncounted=None if session.engine.data_ranks == session.engine.world_size else _CUT,
        counts_slots=not any(layer.router.mixes_tokens for layer in model.routed_layers()),
    )


def put_training(session: Session, results: Results, stage: str, missing: Mapping[str, str]) -> None:
    """The figures of a leg as far as it has come, with the reasons of those that are null."""
    if not session.is_rank0:
        return
    rows = [row for row in read_rows(session.run_dir.path / METRICS_FILE) if row.get("stage") == stage]
    figures = summarise_stage(rows)
    reasons = {name: reason for name, reason in missing.items() if figures.get(name) is None}
    stages = results.content.setdefault("training", {})
    stages[stage] = figures | {"missing": reasons}
    results.write()


def account(session: Session, results: Results) -> None:
    """Time, memory and energy of this process; of a run that was resumed the sums of its parts."""
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
    results.add_time("total_s", time.time() - session.started)
    if session.ledger is not None:
        results.content["goodput"] = session.ledger.figures(time.time(), session.loop.spent)
    results.write()


def _put_energy(results: Results, joules: float, reason: str) -> None:
    """All that the devices used while a process of the run was open; null once a part of it is not known."""
    before = results.content.get("energy")
    if not math.isfinite(joules):
        results.content["energy"] = {"kwh": None, "reason": reason}
    elif before is None or before["kwh"] is not None:
        earlier = 0.0 if before is None else before["kwh"]
        results.content["energy"] = {"kwh": earlier + joules / _JOULES_PER_KWH}
