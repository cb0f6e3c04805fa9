"""The embedded default: a small Llama with its own tokenizer, trained on the run's data and cached.

It is what a run upcycles where no checkpoint is given, so that the whole job runs on any machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from recipes.checkpoint import find_checkpoint
from recipes.config.schema import DefaultModelConfig, RunConfig
from recipes.data.bpe import train_byte_level_bpe
from recipes.data.build_data import TrainData, load_data
from recipes.data.sources import fingerprint, read_documents
from recipes.engines.optim.optimizer import OptimConfig, ScheduleConfig
from recipes.jobs.base import Session
from recipes.models.hf.hf_model import HFModel
from recipes.training.model_costs import measure_costs
from recipes.training.training_loop import Stage, StageResult

# Raised when the code changes what the default becomes, so that old caches are not taken for it.
_VERSION = 1

# Options of engines that say which rank holds what.
_LAYOUT = ("expert_parallel", "replicas", "tensor_parallel")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def default_tokenizer(session: Session) -> Path:
    """The folder of the tokenizer, trained now unless it is cached."""
    config = session.config
    key = _key("tokenizer", fingerprint(config.data), config.model.vocab_size)
    folder = cache_dir(config) / f"tokenizer-{key}"

    def train() -> None:
        if folder.is_dir():
            return
        session.log(f"tokenizer: training a byte-level BPE of {config.model.vocab_size} entries")
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        read = session.heartbeat.each(read_documents(config.data, session.lines))
        documents = (document.text for document in read)
        train_byte_level_bpe(documents, config.model.vocab_size, temporary)
        temporary.rename(folder)

    session.on_rank_zero(train)
    return folder


def cache_dir(config: RunConfig) -> Path:
    """``cache_dir``, absolute."""
    return Path(config.cache_dir).expanduser().absolute()


def default_dense(session: Session) -> tuple[Path, TrainData]:
    """The folder of the default, which `train_default` fills, and the data it is trained on."""
    config = session.config
    tokenizer = default_tokenizer(session)
    data = shared_data(session, tokenizer, config.model.vocab_size)
    settings = dataclasses.asdict(config.model), config.train.global_batch_size, config.data.seq_len
    # Engines round differently by their settings (precision), so that each has its own default. How the ranks
    # are laid out is none of them, as their number is none.
    engine = dataclasses.asdict(config.engine)
    settings += ({name: value for name, value in engine.items() if name not in _LAYOUT},)
    folder = cache_dir(config) / f"dense-{_key('dense', settings, data.fingerprint)}"
    return folder / "hf", data


def train_default(session: Session, dense: Path, data: TrainData) -> bool:
    """Trains the default unless it is cached.

    Args:
        session: The run.
        dense: Its folder, as `default_dense` says.
        data: What it is trained on.

    Returns:
        False when the run was asked to stop before the default was trained.
    """
    if session.on_rank_zero(lambda: (dense / "config.json").is_file()):
        session.log(f"dense: using the embedded default cached in {dense}")
        return True
    started = time.time()
    session.heartbeat.beat("making the dense default")
    finished = _train(session, dense.parent, default_tokenizer(session), data)
    session.log(f"dense: the embedded default took {time.time() - started:.0f} s")
    return finished


def shared_data(session: Session, tokenizer: Path, vocab_size: int) -> TrainData:
    """The run's samples: tokenised by rank 0, read by all."""
    cache = cache_dir(session.config) / "tokens"

    def load() -> None:
        load_data(session.config.data, tokenizer, cache, vocab_size, session.lines)

    session.on_rank_zero(load)
    return load_data(session.config.data, tokenizer, cache, vocab_size, lambda line: None)


def vocab_size_of(folder: Path) -> int:
    """Rows of the embedding of a checkpoint."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(config.get_text_config().vocab_size)


def _train(session: Session, folder: Path, tokenizer: Path, data: TrainData) -> bool:
    config = session.config
    model = fresh_model(config.model, config.data.seq_len, tokenizer)
    costs = measure_costs(model, config.data.seq_len, None)
    what = "training a Llama" if config.model.steps else "drawing the weights of a Llama"
    session.log(f"dense: no checkpoint given, {what} of {costs.total_params:,} parameters")
    optim = _optim(config.model)
    stage = Stage(
        name="dense",
        title="dense",
        train=dataclasses.replace(config.train, steps=config.model.steps),
        optim=optim,
        data=data,
        train_module=session.engine.prepare(model, optim),
        costs=costs,
        checkpoints=folder / "checkpoints",
        seed=config.model.seed,
    )
    found = find_checkpoint(stage.checkpoints)
    if found.path is not None:
        session.log(f"dense: going on from {found.path}")
        stage.state |= session.loop.resume(stage, found.path)
    result = session.loop.run(stage)
    if result.finished:
        _save(session, stage, result, folder, tokenizer)
    return result.finished


def _optim(model: DefaultModelConfig) -> OptimConfig:
    """The default's own: what ``optim`` says is of the run, and the cache does not depend on it."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=model.warmup_steps, min_lr_ratio=0.1)
    return OptimConfig(name="adamw", lr=model.lr, schedule=schedule)


def fresh_model(model: DefaultModelConfig, seq_len: int, tokenizer: Path) -> HFModel:
    """The default with its weights as they are drawn."""
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


def _save(session: Session, stage: Stage, result: StageResult, folder: Path, tokenizer: Path) -> None:
    """Saves an ordinary Hugging Face folder, under its name only when it is whole."""
    session.heartbeat.beat("saving the dense default")
    weights = {
        name: tensor.cpu() for name, tensor in session.heartbeat.each(stage.train_module.full_tensors())
    }
    temporary = folder / ".tmp-hf"

    def save() -> None:
        from transformers import LlamaForCausalLM

        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(tokenizer, temporary)
        plain = LlamaForCausalLM(stage.train_module.model.config)
        plain.load_state_dict(weights, strict=False)
        plain.tie_weights()
        plain.config.use_cache = True
        plain.save_pretrained(temporary)
        temporary.rename(folder / "hf")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    session.on_rank_zero(save)
    session.log(f"dense: validation loss {result.val_loss:.3f}, saved in {folder / 'hf'}")
