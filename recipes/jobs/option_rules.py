"""Checks of a run that need its options and the names of files alone: they import no torch.

Each returns every mistake that it finds; `recipes.jobs.preflight` has those of models, devices and libraries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import FieldError, Mistake, UserError
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.dense_shape import FFNShape
from recipes.config.places import check_folder
from recipes.config.schema import RunConfig
from recipes.config.sections.calibration_config import CalibrationConfig
from recipes.data.chat_template import check_chat_template
from recipes.data.sources import check_paths
from recipes.engines.run_options import default_model_config
from recipes.jobs.low_rank_rules import check_low_rank
from recipes.jobs.run_dir import choose_run_dir
from recipes.jobs.top_k_schedules import check_top_k_schedule, check_top_k_schedule_layers
from recipes.models.hf.attention_options import option_mistakes
from recipes.models.hf.branches import check_sources
from recipes.models.hf.config_file import context_length, read_config
from recipes.models.hf.header_shape import read_ffn_shape
from recipes.models.hf.inspection import check_dense
from recipes.runtime.extras import check_names
from recipes.runtime.relaunch import Launch
from recipes.upcycling.prompts.prompt_file import check_prompt_file

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_options(config: RunConfig, world_size: int) -> list[Mistake]:
    """Checks batch, router, method, engine, schedules, data and folders."""
    ranks = world_size // config.engine.model_parallel_size
    mistakes = check_batch(config, max(1, ranks)) + check_router(config) + check_engine_options(config)
    mistakes += check_top_k_schedule(config) + check_schedule(config) + check_paths(config.data)
    mistakes += check_folders(config) + check_names() + config.tracker.check()
    mistakes += check_calibration(config) + check_run_dir(config) + check_start_from(config)
    mistakes += check_chat_template(config.data, config.dense) + check_prompt_file(config)
    faults = []
    if config.dense is not None:
        faults = check_dense(config.dense, trust_remote_code=config.trust_remote_code)
    shape = None if faults else dense_shape(config)
    if config.router.check(config.upcycle.num_experts) is None:
        mistakes += config.upcycle.check(config.router, shape)
    mistakes += check_low_rank(config, shape) + faults
    trust = config.trust_remote_code
    mistakes += check_sources(config.upcycle.source_folders, config.dense, trust_remote_code=trust)
    return mistakes if faults else mistakes + check_model(config)


def check_batch(config: RunConfig, world_size: int) -> list[Mistake]:
    """Checks that the global batch divides over ranks and micro-batches."""
    train = config.train
    if train.micro_batch_size == "auto":
        if train.global_batch_size % world_size == 0:
            return []
        rule = f"it does not divide over {world_size} ranks"
        remedy = f"Set a multiple of {world_size}."
        return [Mistake("train.global_batch_size", train.global_batch_size, rule, remedy)]
    unit = train.micro_batch_size * world_size
    if train.global_batch_size % unit == 0:
        return []
    rule = f"it is no multiple of train.micro_batch_size={train.micro_batch_size} times {world_size} ranks"
    return [Mistake("train.global_batch_size", train.global_batch_size, rule, f"Set a multiple of {unit}.")]


def check_router(config: RunConfig) -> list[Mistake]:
    """Checks that the router can route over so many experts, by the keys that a run knows of its tokens."""
    mistakes = []
    for key in sorted(config.router.needed_keys):
        rule = "the data of a run carries no such key of its tokens: it is for callers of the library"
        remedy = "Set router.key=token_ids, and router.edges to the first ids of the ranges."
        mistakes.append(Mistake("router.key", key, rule, remedy))
    found = config.router.check(config.upcycle.num_experts)
    if found is not None:
        mistakes.append(found.under("router"))
    return mistakes


def check_engine_options(config: RunConfig) -> list[Mistake]:
    """Checks that the engine can lay out its ranks, and train this MoE model with the run's other options."""
    return check_layout(config) + config.engine.check_moe(config.upcycle.num_experts, config.router)


def check_layout(config: RunConfig) -> list[Mistake]:
    """Checks what the engine says of its ranks and of options other than router and experts."""
    engine = config.engine
    mistakes = engine.check_optimizer(config.optim) + engine.check_run(config)
    found = engine.check(int(os.environ.get("WORLD_SIZE", "1")))
    return mistakes if found is None else [found.under("engine"), *mistakes]


def check_start_from(config: RunConfig) -> list[Mistake]:
    """Checks that what is trained can begin with the state of a dense model's optimizer."""
    path, given, method = "optim.start_from", config.optim.start_from, config.upcycle
    if given is None:
        return []
    mistakes = []
    if not isinstance(method, CopyConfig) or method.noise_std or method.permute:
        rule = "only plain copies of a network have its optimizer state"
        remedy = "Set upcycle=copy without noise or permuted neurons, or null."
        mistakes.append(Mistake(path, given, rule, remedy))
    if config.dense is None:
        rule = "the state belongs to a dense model, and dense names none"
        remedy = "Set dense to that model, which python -m tools.export RUN --stage cpt writes."
        mistakes.append(Mistake(path, given, rule, remedy))
    return mistakes


def dense_shape(config: RunConfig) -> FFNShape | None:
    """Returns the shape of the dense model's networks; None where its family is not known."""
    if config.dense is not None:
        return read_ffn_shape(Path(config.dense).expanduser())
    model = config.model
    return FFNShape(model.intermediate_size, model.hidden_size, gated=True, activation="silu")


def check_schedule(config: RunConfig) -> list[Mistake]:
    """Checks that warm-up and decay fit into the run."""
    if config.train.steps == 0:
        return []
    try:
        config.optim.schedule.check(config.train.steps)
    except FieldError as error:
        return list(error.under("optim.schedule").mistakes)
    return []


def check_calibration(config: RunConfig) -> list[Mistake]:
    """Checks that text of the calibration's own exists."""
    path = config.section(CalibrationConfig).path
    if path is None:
        return []
    return check_paths(config.data.of(path), "calibration")


def check_model(config: RunConfig) -> list[Mistake]:
    """Checks layers, attention and length against the dense model; of the default one its schedule, too."""
    if config.dense is not None:
        return _check_dense_model(config, read_config(Path(config.dense).expanduser()))
    mistakes = check_layers(config, config.model.num_layers)
    mistakes += _check_attention(config, default_model_config(config.model))
    if 0 < config.model.steps <= config.model.warmup_steps:
        rule = f"it does not fit into model.steps={config.model.steps}"
        mistakes.append(Mistake("model.warmup_steps", config.model.warmup_steps, rule, "Lower it."))
    return mistakes


def _check_dense_model(config: RunConfig, dense: dict[str, Any]) -> list[Mistake]:
    text = dense.get("text_config") or dense
    depth = _first(text, _DEPTH_KEYS)
    mistakes = ([] if depth is None else check_layers(config, depth)) + _check_attention(config, dense)
    return mistakes + check_context(config, dense)


def check_context(config: RunConfig, given: Mapping[str, Any]) -> list[Mistake]:
    """Checks that the model takes samples so long.

    Args:
        config: The run.
        given: The content of its ``config.json``.
    """
    context = context_length(given)
    if context is None or config.data.seq_len <= context:
        return []
    rule = f"the model takes {context} tokens at most"
    return [Mistake("data.seq_len", config.data.seq_len, rule, f"Set {context} or less.")]


def _check_attention(config: RunConfig, dense: Mapping[str, Any]) -> list[Mistake]:
    return [] if config.attention is None else option_mistakes(config.attention, dense)


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def check_layers(config: RunConfig, depth: int) -> list[Mistake]:
    """Checks that the model has the layers that are to become MoE layers."""
    try:
        picked = config.upcycle.layer_choice.pick(depth)
    except FieldError as error:
        return list(error.under("upcycle").mistakes)
    return check_top_k_schedule_layers(config, len(picked))


def check_run_dir(config: RunConfig) -> list[Mistake]:
    """Checks that a new run does not exist and a resumed one does; rank 0 decides, as when it runs."""
    if os.environ.get("RANK", "0") != "0":
        return []
    try:
        choose_run_dir(config, Launch.of_this_process())
    except UserError as error:
        return list(error.mistakes)
    except (OSError, ValueError) as error:
        if check_folders(config):
            return []  # said of the folder already
        rule = f"it is no path ({error})"
        return [Mistake("resume", config.resume, rule, "Give a run directory, auto or none.")]
    return []


def check_folders(config: RunConfig) -> list[Mistake]:
    """Checks that output and cache folder can be written or made."""
    return check_folder("output_dir", config.output_dir) + check_folder("cache_dir", config.cache_dir)
