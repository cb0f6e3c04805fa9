"""Checks of models, devices and libraries before anything expensive starts, once the options are right.

Each returns every mistake that it finds; `recipes.jobs.option_rules` has those of options alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import Mistake, UserError
from moe.upcycle import upcycle_method
from recipes.config.schema import RunConfig
from recipes.data.chat_tokens import check_first_row
from recipes.data.tokenizer import check_tokenizer
from recipes.engines import engine_classes
from recipes.engines.run_options import default_model_config
from recipes.jobs.expert_rules import check_backend
from recipes.jobs.memory_check import check_memory
from recipes.jobs.option_rules import dense_shape
from recipes.models.export.companions import check_carried_tokenizer, check_companions
from recipes.models.hf.attention_blocks import attention_mistakes
from recipes.models.hf.config_file import load_config, read_config, trusts
from recipes.models.hf.ffn_names import require_runs
from recipes.models.hf.packed_attention import check_documents
from recipes.upcycling.convert.moe_plan import open_dense
from recipes.upcycling.optim_start import check_optim_start
from recipes.upcycling.prompts.prompt_rows import check_prompts


def check_models(config: RunConfig, world_size: int) -> list[Mistake]:
    """Checks engine, method, back end, dense checkpoint, tokenizer and memory, once the options are right."""
    shape = dense_shape(config)
    mistakes = check_engine(config) + check_optim_start(config)
    mistakes += upcycle_method(config.upcycle).check(config.router, shape)
    mistakes += check_prompts(config) + check_backend(config, shape)
    if config.dense is None:
        return mistakes + check_attention(config, default_model_config(config.model))
    folder, trust = Path(config.dense).expanduser(), config.trust_remote_code
    mistakes += check_fit(config, read_config(folder)) or check_opens(config)
    mistakes = mistakes or check_documents(config.data, folder, trust_remote_code=trust)
    mistakes = mistakes or check_first_row(config.data, config.dense, trust_remote_code=trust)
    return mistakes or check_memory(config, world_size)


def check_opens(config: RunConfig) -> list[Mistake]:
    """Checks that transformers builds and runs the model, and that the files hold it and may be copied."""
    folder, trust = Path(config.dense or "").expanduser(), config.trust_remote_code
    try:
        open_dense(folder, trust_remote_code=trust)
        require_runs(folder, trust_remote_code=trust)
    except UserError as error:
        return list(error.mistakes)
    path, code = config.dense or "", trusts(folder, trust)
    mistakes = check_companions(path, code=code, trust_remote_code=trust)
    return mistakes or check_carried_tokenizer(path, trust_remote_code=trust)


def check_attention(config: RunConfig, dense: Mapping[str, Any]) -> list[Mistake]:
    """Checks that the attention can become experts, where it is to.

    Args:
        config: The run.
        dense: The content of the dense model's ``config.json``.
    """
    return [] if config.attention is None else attention_mistakes(config.attention, dense)


def check_engine(config: RunConfig) -> list[Mistake]:
    """Checks that the machine can run the engine, and that the engine can train the model."""
    engine = engine_classes()[config.engine.name]
    found = engine.check(config.engine)
    return ([] if found is None else [found.under("engine")]) + engine.check_run(config.engine, config)


def check_fit(config: RunConfig, dense: dict[str, Any]) -> list[Mistake]:
    """Checks tokenizer and attention against the dense model, whose config is what is wrong if it is."""
    text = dense.get("text_config") or dense
    vocab_size, trust = text.get("vocab_size"), config.trust_remote_code
    try:
        load_config(Path(config.dense or "").expanduser(), trust_remote_code=trust)
    except UserError as error:
        return list(error.mistakes)
    mistakes = check_tokenizer(config.dense or "", vocab_size, "dense", trust_remote_code=trust)
    return mistakes + check_attention(config, dense)
