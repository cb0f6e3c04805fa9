"""Parts of the upcycled model's stage: it is built from the dense files, reported and exported."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from moe.routing.top_k_schedule import TopKSchedule
from moe.upcycle import upcycle_method
from moe.upcycle.base import UpcycleMethod
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.jobs.export_stage import check_export_early, export_moe
from recipes.jobs.memory_check import foresee_memory
from recipes.jobs.rounding import StepZero
from recipes.jobs.stage_run import Built, StageParts, StageRun
from recipes.jobs.top_k_schedules import schedule_of, summarise_phases
from recipes.models.export.spec import describe_model
from recipes.models.hf.attention_blocks import (
    describe_attention,
    summarise_attention,
    swap_attention,
    upcycle_attention,
)
from recipes.models.hf.branches import check_sources
from recipes.models.hf.deferred_init import CheckpointWeights
from recipes.models.hf.drift import describe_surgery, summarise_surgery
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.models.lora_model import add_low_rank, require_rank
from recipes.tracking.results import stage_label
from recipes.training.model_costs import measure_costs
from recipes.training.stage import Stage, StageResult
from recipes.training.validation import validation_loss
from recipes.upcycling.calibration.gather import Calibration, LayerTensors, kept_statistics
from recipes.upcycling.convert.folder_check import telling_rows
from recipes.upcycling.convert.moe_plan import MoEPlan, plan_moe, request_of
from recipes.upcycling.optim_start import start_optimizer
from recipes.upcycling.prompts.prompt_rows import with_prompt_rows
from recipes.upcycling.sharded.sharded_check import measure_shards, measure_whole
from recipes.upcycling.sharded.sharded_models import materialize, moe_model

_WHOLE = "experts of attention are made of whole models"


def build_moe(run: StageRun, source: Path | None, statistics_of: Path | None = None) -> Built | None:
    """Builds the MoE model, in shards unless its attention becomes experts as well.

    Args:
        run: The stage.
        source: Checkpoint that it goes on from.
        statistics_of: Checkpoint of the run whose statistics planned the experts; None for ``source``.

    Returns:
        None when the run was asked to stop meanwhile.
    """
    method = upcycle_method(run.config.upcycle)
    statistics = _statistics(run, method, statistics_of or source)
    if statistics is None:
        return None
    return _with_factors(run, _build(run, source, statistics), source)


def _build(run: StageRun, source: Path | None, statistics: LayerTensors) -> Built:
    """Builds on each rank the part that it holds, or the whole model if its attention becomes experts."""
    config, attention = run.config, run.config.attention
    plan = _plan(run, source, statistics)
    require_rank(plan.spec, config.experts.lora)
    backend, schedule = config.experts.backend, schedule_of(config, list(plan.plans))
    blank, begun = partial(_blank, run, plan, schedule), partial(_step_zero, run, plan, statistics)
    begin = partial(check_export_early, run)
    _foresee(run, plan)
    if source is not None:
        # Exactness was measured when the run began: a checkpoint's weights need not be made.
        return Built(blank(), {}, begin, blank=blank, begun=begun)
    run.beat("the equivalence check at step 0")
    tokens_BS = telling_rows(run.inputs.folder, run.data.validation)
    if attention is None:
        report, weights = measure_shards(run.engine, plan, tokens_BS, backend, schedule)
        model = moe_model(plan, backend, weights)
        model.schedule = schedule
    else:
        run.log(f"{run.name}: every rank makes the whole MoE model at first: {_WHOLE}")
        report, model = measure_whole(run.engine, plan, tokens_BS, backend, schedule)
    run.log(describe_surgery(report))
    state = {"exactness": summarise_surgery(report)}
    if attention is not None:
        cut = upcycle_attention(model, attention, config.seed, tokens_BS)
        run.log(describe_attention(cut))
        state["attention"] = summarise_attention(cut)
    return Built(model, state, begin, blank=blank, begun=begun)


def _foresee(run: StageRun, plan: MoEPlan) -> None:
    """Foresees the memory of what is trained: low-rank factors alone, where there are any."""
    shape = moe_model(plan, run.config.experts.backend, CheckpointWeights())
    add_low_rank(shape, run.config.experts.lora, run.config.seed)
    foresee_memory(run, shape)


def _step_zero(run: StageRun, plan: MoEPlan, statistics: LayerTensors) -> StepZero:
    """Opens the dense files again, by which the weights of step 0 are made."""
    if plan.model is not None:
        return StepZero(plan.model, plan)
    again = plan_moe(request_of(run.config, run.inputs.folder), statistics)
    assert again.model is not None, again
    # Rows that prompts gave a router are not kept.
    return StepZero(again.model, again, routers=run.config.section(PromptsConfig).path is None)


def _blank(run: StageRun, plan: MoEPlan, schedule: TopKSchedule | None) -> HFModel:
    """Returns a model of the same shapes, whose weights are none yet."""
    model = moe_model(plan, run.config.experts.backend, CheckpointWeights())
    if run.config.attention is not None:
        swap_attention(materialize(model), run.config.attention, run.config.seed, verify=False)
    model.schedule = schedule
    return model


def _plan(run: StageRun, source: Path | None, statistics: LayerTensors) -> MoEPlan:
    config, folder = run.config, run.inputs.folder
    branches = upcycle_method(config.upcycle).sources if source is None else ()
    # The preflight has no default model to compare them with.
    if mistakes := check_sources(branches, str(folder), trust_remote_code=config.trust_remote_code):
        raise ConfigError(mistakes)
    return plan_moe(request_of(config, folder), statistics, reads=source is None)


def _with_factors(run: StageRun, built: Built, source: Path | None) -> Built:
    """Adds low-rank factors and the dense model's optimizer state where the config asks for them."""
    lora, name = run.config.experts.lora, run.name
    require_rank(describe_model(built.model), lora)
    add_low_rank(built.model, lora, run.config.seed)
    if lora.rank:
        run.log(f"{name}: low-rank factors of rank {lora.rank} train in the place of the experts' weights")
    given = run.config.optim.start_from
    if given is None or source is not None:
        return built
    folder, before = Path(given).expanduser(), built.begin

    def begin(stage: Stage) -> None:
        if before is not None:
            before(stage)
        spec, tensors = describe_model(stage.train_module.skeleton), stage.train_module.checkpoint_tensors()
        trust = run.config.trust_remote_code
        done = start_optimizer(tensors, spec, run.inputs.folder, folder, trust_remote_code=trust)
        run.log(f"{name}: optimizer state of step {done} of {folder}, none for the routers")

    return replace(built, begin=begin)


def _statistics(run: StageRun, method: UpcycleMethod[Any], source: Path | None) -> LayerTensors | None:
    """Returns the statistics and router rows that the method needs; None when asked to stop meanwhile."""
    inputs = run.inputs
    if source is not None:
        return kept_statistics(inputs.console, inputs.run_dir.path, source) if method.statistics else {}
    if not method.statistics and run.config.section(PromptsConfig).path is None:
        return {}
    run.beat("calibration")
    run.log(f"{run.name}: every rank loads the whole dense model, to look at text with it")
    model = load_model(inputs.folder, trust_remote_code=run.config.trust_remote_code)
    found: LayerTensors | None = {}
    if method.statistics:
        found = Calibration(
            run.config, inputs.console, inputs.stop, inputs.run_dir.path, model, method, run.data
        ).run()
    known = None if found is None else with_prompt_rows(found, run.config, model)
    run.beat("making the model")
    del model
    gc.collect()
    return known


def report_moe(run: StageRun, stage: Stage, result: StageResult) -> None:
    """Reports exactness and the dense model's loss, and exports the model."""
    run.results.put("exactness", stage.state["exactness"])
    if "attention" in stage.state:
        run.results.put("attention", stage.state["attention"])
    if stage.scheduled_costs:
        phases = summarise_phases(stage.train_module.model.schedule, stage.scheduled_costs)
        run.results.put("top_k_schedule", phases)
    _put_dense(run)
    export_moe(run, stage)
    _, layer = stage.train_module.model.moe_layers()[0]
    choice = layer.experts.backend_choice()
    if choice is not None:
        run.results.put("experts", {"backend": choice.backend.name, "reason": choice.reason})


MOE = StageParts("moe", build_moe, report_moe)


def _put_dense(run: StageRun) -> None:
    """Adds the row of the dense model that everything is compared with."""
    run.beat("evaluating the dense model")
    model = run.dense()
    costs = measure_costs(model, run.config.data.seq_len, None)
    train_module = run.engine.prepare(model, run.config.optim)
    loss = validation_loss(run.engine, train_module, run.data, run.config.train, run.inputs.console.heartbeat)
    run.results.put_stage("dense", stage_label("dense"), loss, 0, costs, None)
