"""Default model: a small Llama with its own tokenizer, trained on the run's data and cached.

A run upcycles it where no checkpoint is given, so that the whole job runs on any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.checkpoint import Origin, find_checkpoint
from recipes.config.schema import DefaultModelConfig, RunConfig
from recipes.data.bpe import train_byte_level_bpe
from recipes.data.build_data import TrainData, load_data
from recipes.data.repeats import describe_repeats
from recipes.data.sources import fingerprint, read_documents
from recipes.engines.console import RankConsole
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import ScheduleConfig
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.claim import GaveUpError, lock_beside, wait_for
from recipes.runtime.interrupt import StopRequest
from recipes.training.model_costs import measure_costs
from recipes.training.training_loop import Loop, Stage, StageResult

# Raised when the code changes the default model, so that old caches are not taken for it.
_VERSION = 1

# Options of engines that lay out the ranks.
_LAYOUT = ("expert_parallel", "replicas", "tensor_parallel")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def default_tokenizer(config: RunConfig, console: RankConsole) -> Path:
    """Returns the folder of the tokenizer, trained now unless it is cached."""
    key = _key("tokenizer", fingerprint(config.data), config.model.vocab_size)
    folder = cache_dir(config) / f"tokenizer-{key}"

    def train() -> None:
        if folder.is_dir():
            return
        with wait_for(lock_beside(folder), console.log, _keep_waiting(console)):
            if folder.is_dir():
                return
            console.log(f"tokenizer: training a byte-level BPE of {config.model.vocab_size} entries")
            temporary = _fresh(folder)
            read = console.heartbeat.each(read_documents(config.data, console.lines))
            documents = (document.text for document in read)
            train_byte_level_bpe(documents, config.model.vocab_size, temporary)
            temporary.rename(folder)

    console.on_rank_zero(train)
    return folder


def _fresh(folder: Path) -> Path:
    """Returns the name under which the holder of the folder's lock makes it, with nothing there."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _keep_waiting(console: RankConsole, stop: StopRequest | None = None) -> Callable[[], bool]:
    """Returns what is called while another process makes the same: waiting is no hang, and ends at a stop."""

    def keep_on() -> bool:
        console.heartbeat.progress()
        return stop is None or not stop.requested

    return keep_on


def cache_dir(config: RunConfig) -> Path:
    """Returns ``cache_dir`` as an absolute path."""
    return Path(config.cache_dir).expanduser().absolute()


def default_dense(config: RunConfig, console: RankConsole) -> tuple[Path, TrainData]:
    """Returns the folder of the default model, which `train_default` fills, and its training data."""
    data = shared_data(config, console, default_tokenizer(config, console), config.model.vocab_size)
    # Engines round differently by their settings (precision), so that each has its own default model; number
    # and layout of the ranks do not matter.
    engine = {k: v for k, v in dataclasses.asdict(config.engine).items() if k not in _LAYOUT}
    model = dataclasses.asdict(config.model)
    settings = (model, config.train.global_batch_size, config.data.seq_len, engine)
    folder = cache_dir(config) / f"dense-{_key('dense', settings, data.fingerprint)}"
    return folder / "hf", data


def train_default(config: RunConfig, console: RankConsole, loop: Loop, dense: Path, data: TrainData) -> bool:
    """Trains the default model unless it is cached.

    Args:
        config: Config of the run.
        console: Its ranks.
        loop: Its training loop.
        dense: Folder of the default model, from `default_dense`.
        data: Training data, from the same.

    Returns:
        False when the run was asked to stop before the model was trained.
    """
    if console.on_rank_zero(lambda: (dense / "config.json").is_file()):
        console.log(f"dense: using the default model cached in {dense}")
        return True
    started = time.monotonic()
    console.heartbeat.beat("making the dense default")
    with contextlib.ExitStack() as claimed:
        if not console.on_rank_zero(lambda: _claim(dense.parent, console, loop.stop, claimed)):
            return False
        if console.on_rank_zero(lambda: (dense / "config.json").is_file()):
            console.log(f"dense: another process has made the default model: {dense}")
            return True
        finished = _train(config, console, loop, dense.parent, data)
    console.log(f"dense: the default model took {time.monotonic() - started:.0f} s")
    return finished


def _claim(folder: Path, console: RankConsole, stop: StopRequest, claimed: contextlib.ExitStack) -> bool:
    """Claims the default model's folder until ``claimed`` is closed; returns False when asked to stop."""
    try:
        claimed.enter_context(wait_for(lock_beside(folder), console.log, _keep_waiting(console, stop)))
    except GaveUpError:
        return False
    return True


def shared_data(config: RunConfig, console: RankConsole, tokenizer: Path, vocab_size: int) -> TrainData:
    """Loads the run's samples, which rank 0 tokenises and all ranks read."""
    cache = cache_dir(config) / "tokens"

    def load(log: Callable[[str], None]) -> TrainData:
        trust = config.trust_remote_code
        return load_data(config.data, tokenizer, cache, vocab_size, log, trust_remote_code=trust)

    def load_first() -> str:
        if twice := describe_repeats(config.data):
            console.lines(twice)
        return load(console.lines).fingerprint

    console.on_rank_zero(load_first)
    return load(lambda line: None)


def _train(config: RunConfig, console: RankConsole, loop: Loop, folder: Path, data: TrainData) -> bool:
    tokenizer = default_tokenizer(config, console)
    model = fresh_model(config.model, config.data.seq_len, tokenizer)
    costs = measure_costs(model, config.data.seq_len, None)
    what = "training a Llama" if config.model.steps else "drawing the weights of a Llama"
    console.log(f"dense: no checkpoint given, {what} of {costs.total_params:,} parameters")
    optim = _optim(config.model)
    stage = Stage(
        name="dense",
        title="dense",
        train=dataclasses.replace(config.train, steps=config.model.steps),
        optim=optim,
        data=data,
        train_module=console.engine.prepare(model, optim),
        costs=costs,
        checkpoints=folder / "checkpoints",
        origin=Origin(folder.name),
        seed=config.model.seed,
    )
    found = find_checkpoint(stage.checkpoints, run=folder.name)
    for line in found.lines():
        console.log(f"dense: {line}")
    if found.path is not None:
        console.log(f"dense: going on from {found.path}")
        stage.state |= loop.resume(stage, found.path)
    result = loop.run(stage)
    if result.finished:
        _save(console, stage, result, folder, tokenizer)
    return result.finished


def _optim(model: DefaultModelConfig) -> OptimConfig:
    """Returns the default model's own optimizer; its cache does not depend on ``optim``."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=model.warmup_steps, min_lr_ratio=0.1)
    return OptimConfig(name="adamw", lr=model.lr, schedule=schedule)


def fresh_model(model: DefaultModelConfig, seq_len: int, tokenizer: Path) -> HFModel:
    """Builds the default model with its weights as they are drawn."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    end = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).eos_token_id
    llama = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        tie_word_embeddings=model.tie_embeddings,
        max_position_embeddings=max(2048, seq_len),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(model.seed)
        built = LlamaForCausalLM(llama)
    built.config.use_cache = False
    return HFModel(module=built, folder=tokenizer, source_dtype=torch.float32)


def _save(console: RankConsole, stage: Stage, result: StageResult, folder: Path, tokenizer: Path) -> None:
    """Saves an ordinary Hugging Face folder, under its name only when it is whole."""
    console.heartbeat.beat("saving the dense default")
    full = console.heartbeat.each(stage.train_module.full_tensors())
    weights = {name: tensor.cpu() for name, tensor in full}

    def save() -> None:
        from transformers import LlamaForCausalLM

        temporary = _fresh(folder / "hf")
        shutil.copytree(tokenizer, temporary)
        plain = LlamaForCausalLM(stage.train_module.model.config)
        plain.load_state_dict(weights, strict=False)
        plain.tie_weights()
        plain.config.use_cache = True
        plain.save_pretrained(temporary)
        temporary.rename(folder / "hf")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    console.on_rank_zero(save)
    console.log(f"dense: validation loss {result.val_loss:.3f}, saved in {folder / 'hf'}")
