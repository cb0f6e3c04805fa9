"""The stages of the job `upcycle_vs_cpt`: each budget of an arm is a finished run of its own."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe.accounting.shape import shape_from_config
from moe.errors import CheckpointError, ConfigError, Mistake
from moe.layer import MoELayer
from moe.routing.draws import seeded_generator
from recipes.checkpoint import Retention, own_checkpoints, retain, step_name, verify_checkpoint
from recipes.config.renamed import with_new_names
from recipes.config.schema import RunConfig
from recipes.config.sections.upcycle_vs_cpt_config import UpcycleVsCPTConfig
from recipes.jobs.arm_costs import continued_steps, scratch_steps, serving_costs
from recipes.jobs.default_model import default_tokenizer, fresh_model
from recipes.jobs.moe_stage import MOE, report_moe
from recipes.jobs.run_dir import RunDir
from recipes.jobs.stage_run import CPT, Built, StageInputs, StageParts, StageRun, with_steps
from recipes.models.hf.config_file import load_config, read_config
from recipes.models.hf.deferred_init import CheckpointWeights
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.training.model_costs import measure_costs
from recipes.training.training_loop import Stage, StageResult
from recipes.upcycling.convert.moe_plan import plan_moe, request_of
from recipes.upcycling.sharded.sharded_models import insert_moe_layers, materialize


def arm_stages(inputs: StageInputs, sunk: list[int]) -> list[StageRun]:
    """Returns the upcycled model first, which sets the budgets, and of each arm the longest run first.

    Args:
        inputs: Inputs of the run.
        sunk: Dense steps whose FLOPs a model from scratch gets on top, ascending.
    """
    arms = inputs.config.section(UpcycleVsCPTConfig).arms
    stages = []
    if arms != "scratch":
        upcycled = dataclasses.replace(MOE, report=_report_upcycled)
        stages += [StageRun(inputs, parts) for parts in (upcycled, _continued(inputs), _equal_tokens(inputs))]
    if arms != "continued":
        lr = inputs.config.section(UpcycleVsCPTConfig).scratch_lr or inputs.config.optim.lr
        optim = dataclasses.replace(inputs.config.optim, lr=lr)
        scratch = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, optim=optim))
        stages += [StageRun(scratch, _scratch(scratch, steps, sunk[-1])) for steps in [sunk[-1], *sunk[:-1]]]
    return stages


def refuse_other_budgets(config: RunConfig, sunk: list[int], path: Path) -> None:
    """Refuses to go on with a run that began with other budgets.

    Args:
        config: The run.
        sunk: Its dense steps; see `arm_stages`.
        path: Its run directory.

    Raises:
        CheckpointError: It did.
    """
    wanted = {
        "train.steps": config.train.steps,
        "train.eval_every": config.train.eval_every,
        "upcycle_vs_cpt.sunk_steps": sunk,
        "optim.lr": config.optim.lr,
        "optim.schedule": dataclasses.asdict(config.optim.schedule),
        "upcycle_vs_cpt.scratch_lr": config.section(UpcycleVsCPTConfig).scratch_lr,
    }
    began = with_new_names(read_run_file(path).get("budgets", wanted))
    remedy = "Set it back to go on, or start a new run with resume=none."
    changed = [
        Mistake(name, value, f"the run in {path} began with {began[name]!r}", remedy)
        for name, value in wanted.items()
        if began[name] != value
    ]
    if changed:
        raise CheckpointError(changed)
    write_run_file(path, budgets=wanted)


def prune(run_dir: RunDir) -> None:
    """Leaves the newest checkpoint of every stage."""
    for checkpoints in (*run_dir.path.glob("checkpoints"), *run_dir.path.glob("*/checkpoints")):
        if own := own_checkpoints(checkpoints, run_dir.run_id):
            retain(checkpoints, own[0], Retention(last=1), run_dir.run_id)


def _report_upcycled(run: StageRun, stage: Stage, result: StageResult) -> None:
    """Adds the costs of serving before and after to the report of the upcycled model."""
    report_moe(run, stage, result)
    exported = json.loads((run.inputs.run_dir.export / "config.json").read_text(encoding="utf-8"))
    contents = {"dense": read_config(run.inputs.folder), "moe": exported}
    run.results.put("serving", {model: _serving(run.config, content) for model, content in contents.items()})
    _, layer = stage.train_module.model.moe_layers()[0]
    run.results.put("moe", {"num_experts": run.config.upcycle.num_experts, "top_k": layer.router.top_k})
    run.results.put("tokens_per_step", stage.tokens_per_step)


def _serving(config: RunConfig, content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Returns None where the accounting does not know the family: a shape is never guessed."""
    try:
        shape = shape_from_config(content)
    except ConfigError:
        return None
    return serving_costs(shape, config.section(UpcycleVsCPTConfig).batches, config.data.seq_len)


def _constant_steps(run: StageRun) -> int:
    """Returns the steps before the learning rate decays, a multiple of those between checkpoints."""
    train, schedule = run.config.train, run.config.optim.schedule
    constant = max(train.steps - schedule.decay_steps(train.steps), 0)
    return constant // train.eval_every * train.eval_every


def _branch_of(parent: str, run: StageRun) -> Path | None:
    """Returns the stage's own checkpoint, or the newest of a longer run in the constant part of this one.

    The parent decays later, since it is longer: up to there both are one run.
    """
    own, step = run.own_checkpoint(), _constant_steps(run)
    if own is not None or step == 0:
        return own
    path = run.inputs.run_dir.checkpoints(parent) / step_name(step)
    verify_checkpoint(path, run=run.inputs.run_dir.run_id)
    return path


def _continued(inputs: StageInputs) -> StageParts:
    """Returns the parts of the dense model trained on until it has cost as much as the upcycled model."""

    def budget(config: RunConfig) -> RunConfig | None:
        dense, moe = (inputs.results.row(name) for name in ("dense", "moe"))
        if dense is None or moe is None:
            return None
        costs = [row["flops_per_token_train"] for row in (dense, moe)]
        return with_steps(config, continued_steps(inputs.config.train.steps, *costs))

    return dataclasses.replace(CPT, budget=budget)


def _equal_tokens(inputs: StageInputs) -> StageParts:
    """Returns the parts of the dense model on the upcycled model's tokens: a branch of the longer run."""

    def budget(config: RunConfig) -> RunConfig | None:
        known = all(inputs.results.row(name) is not None for name in ("dense", "moe"))
        return with_steps(config, inputs.config.train.steps) if known else None

    return dataclasses.replace(CPT, name="cpt_tokens", budget=budget, source=partial(_branch_of, "cpt"))


def _scratch(inputs: StageInputs, sunk: int, longest: int) -> StageParts:
    """Returns the parts of the MoE model on drawn weights, from the first sample on, as the dense model was.

    Args:
        inputs: Inputs of the run, with the learning rate of this arm.
        sunk: Dense steps whose FLOPs it gets on top of the upcycled model's steps.
        longest: Those of the longest run, which the others branch off from.
    """

    def budget(config: RunConfig) -> RunConfig | None:
        flops = inputs.results.content.get("scratch_flops")
        if flops is None:
            return None
        return with_steps(
            config, scratch_steps(inputs.config.train.steps, sunk, flops["dense"], flops["moe"])
        )

    parts = StageParts("scratch", _build_scratch, budget=budget, prepare=_count_flops, first_sample=0)
    if sunk == longest:
        return parts
    return dataclasses.replace(parts, name=f"scratch_{sunk}", source=partial(_branch_of, "scratch"))


def _count_flops(run: StageRun) -> None:
    """Counts the FLOPs of both models: the steps depend on them."""
    model, seq_len = _drawn(run), run.config.data.seq_len
    dense = measure_costs(model, seq_len, None).flops_per_token_train
    _plan_scratch(run, model)
    moe = measure_costs(model, seq_len, None).flops_per_token_train
    run.results.put("scratch_flops", {"dense": dense, "moe": moe})


def _build_scratch(run: StageRun, source: Path | None) -> Built:
    model = _drawn(run)
    _plan_scratch(run, model)
    materialize(model)
    for _, layer in model.moe_layers():
        _draw(layer, run.config)
    return Built(model, {})


def _plan_scratch(run: StageRun, model: HFModel) -> None:
    """Replaces the networks by MoE layers, of which the method plans nothing but the shapes."""
    plan = plan_moe(request_of(run.config, run.inputs.folder), reads=False)
    insert_moe_layers(model, plan.spec, run.config.experts.backend)
    model.weights = CheckpointWeights()


def _drawn(run: StageRun) -> HFModel:
    """Builds the dense model's shape with weights as they are drawn."""
    config, folder = run.config, run.inputs.folder
    if config.dense is None:
        model = dataclasses.replace(config.model, seed=config.seed)
        return fresh_model(model, config.data.seq_len, default_tokenizer(config, run.inputs.console))
    from transformers import AutoModelForCausalLM

    trust = config.trust_remote_code
    shape = load_config(folder, trust_remote_code=trust)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        built = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust, dtype=torch.float32)
    built.config.use_cache = False
    return HFModel(module=built, folder=folder, source_dtype=torch.float32, trust_remote_code=trust)


@torch.no_grad()
def _draw(layer: MoELayer, config: RunConfig) -> None:
    """Draws experts and router anew: a method's experts know of each other, even those of drawn networks."""
    index = layer.context.layer_index
    generator = seeded_generator(config.seed, "scratch", index)
    for part, axes in ((layer.experts, 3), (layer.shared, 2)):
        for parameter in [] if part is None else part.parameters():
            if parameter.ndim < axes:
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.section(UpcycleVsCPTConfig).init_std, generator=generator)
    layer.router.reset_parameters(seeded_generator(config.seed, "scratch-router", index))
