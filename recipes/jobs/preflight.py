"""Checks of a run before anything expensive starts. Each returns every mistake that it finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.errors import FieldError, Mistake, UserError
from moe.upcycle import upcycle_method
from moe.upcycle.dense_shape import FFNShape
from recipes.config.places import check_folder
from recipes.config.schema import RunConfig
from recipes.config.sections.calibration_config import CalibrationConfig
from recipes.data.chat_template import check_chat_template
from recipes.data.chat_tokens import check_first_row
from recipes.data.sources import check_paths
from recipes.data.tokenizer import check_tokenizer
from recipes.engines import engine_classes
from recipes.jobs.expert_rules import check_library, check_low_rank
from recipes.jobs.memory_check import check_memory
from recipes.jobs.run_dir import choose_run_dir
from recipes.jobs.top_k_schedules import check_top_k_schedule, check_top_k_schedule_layers
from recipes.models.export.companions import check_companions
from recipes.models.hf.attention_blocks import attention_mistakes
from recipes.models.hf.branches import check_sources
from recipes.models.hf.config_file import context_length, read_config, trusts
from recipes.models.hf.ffn_names import require_runs
from recipes.models.hf.header_shape import read_ffn_shape
from recipes.models.hf.inspection import check_dense
from recipes.runtime.extras import check_names
from recipes.runtime.relaunch import Launch
from recipes.tracking.trackers import check_tracker
from recipes.upcycling.convert.moe_plan import open_dense
from recipes.upcycling.optim_start import check_optim_start
from recipes.upcycling.prompts.prompt_rows import check_prompts

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_run(config: RunConfig, world_size: int) -> list[Mistake]:
    """Checks batch, router, engine, dense checkpoint, tokenizer, data and folders."""
    ranks = world_size // engine_classes()[config.engine.name].model_parallel_size(config.engine)
    mistakes = check_batch(config, max(1, ranks)) + check_router(config) + check_engine(config)
    mistakes += check_top_k_schedule(config) + check_schedule(config) + check_paths(config.data)
    mistakes += check_folders(config) + check_names() + check_tracker(config.tracker)
    mistakes += check_calibration(config) + check_run_dir(config) + check_optim_start(config)
    mistakes += check_chat_template(config.data, config.dense) + check_library(config)
    if config.dense is None:
        shape = _default_shape(config)
        mistakes += check_method(config, shape) + check_low_rank(config, shape)
        return mistakes + check_model(config)
    found = check_dense(config.dense, trust_remote_code=config.trust_remote_code)
    if found:
        return mistakes + check_method(config, None) + check_low_rank(config, None) + found
    folder = Path(config.dense).expanduser()
    dense = read_ffn_shape(folder)
    mistakes += check_method(config, dense) + check_low_rank(config, dense)
    mistakes += check_fit(config, read_config(folder)) or check_opens(config)
    return mistakes or check_first_row(config.data, config.dense) or check_memory(config, world_size)


def check_opens(config: RunConfig) -> list[Mistake]:
    """Checks that transformers builds and runs the model, and that the files hold it and may be copied."""
    folder, trust = Path(config.dense or "").expanduser(), config.trust_remote_code
    try:
        open_dense(folder, trust_remote_code=trust)
        require_runs(folder, trust_remote_code=trust)
    except UserError as error:
        return list(error.mistakes)
    return check_companions(config.dense or "", code=trusts(folder, trust))


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


def check_method(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Checks the upcycling method against router and dense network, and its sources against the dense model.

    Args:
        config: The run.
        shape: Shape of the dense network, where it is known.
    """
    method = upcycle_method(config.upcycle)
    mistakes = []
    if not check_router(config):
        mistakes += method.check(config.router, shape) + check_prompts(config)
    return mistakes + check_sources(method.sources, config.dense, trust_remote_code=config.trust_remote_code)


def _default_shape(config: RunConfig) -> FFNShape:
    model = config.model
    return FFNShape(model.intermediate_size, model.hidden_size, gated=True, activation="silu")


def _default_model_config(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
    }


def check_attention(config: RunConfig, dense: Mapping[str, Any]) -> list[Mistake]:
    """Checks that the attention can become experts, where it is to.

    Args:
        config: The run.
        dense: The content of the dense model's ``config.json``.
    """
    return [] if config.attention is None else attention_mistakes(config.attention, dense)


def check_engine(config: RunConfig) -> list[Mistake]:
    """Checks that the machine can run the engine, and that the engine can train the MoE model."""
    engine = engine_classes()[config.engine.name]
    mistakes = engine.check_moe(config.engine, config.upcycle.num_experts, config.router)
    mistakes += engine.check_optimizer(config.engine, config.optim)
    mistakes += engine.check_run(config.engine, config)
    found = engine.check(config.engine)
    return mistakes if found is None else [found.under("engine"), *mistakes]


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
    own = replace(config.data, path=path, validation_path=None)
    return check_paths(own, "calibration")


def check_model(config: RunConfig) -> list[Mistake]:
    """Checks schedule and depth of the default model."""
    mistakes = check_layers(config, config.model.num_layers)
    mistakes += check_attention(config, _default_model_config(config))
    if 0 < config.model.steps <= config.model.warmup_steps:
        rule = f"it does not fit into model.steps={config.model.steps}"
        mistakes.append(Mistake("model.warmup_steps", config.model.warmup_steps, rule, "Lower it."))
    return mistakes


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


def check_fit(config: RunConfig, dense: dict[str, Any]) -> list[Mistake]:
    """Checks tokenizer, layers and sequence length against the dense model."""
    text = dense.get("text_config") or dense
    vocab_size = text.get("vocab_size")
    mistakes = check_tokenizer(config.dense or "", vocab_size, "dense") + check_attention(config, dense)
    depth = _first(text, _DEPTH_KEYS)
    if depth is not None:
        mistakes += check_layers(config, depth)
    context = context_length(dense)
    if context is not None and config.data.seq_len > context:
        rule = f"the dense model takes {context} tokens at most"
        mistakes.append(Mistake("data.seq_len", config.data.seq_len, rule, f"Set {context} or less."))
    return mistakes


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)
