"""Builds the training and validation samples of a run, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moe.errors import DataError
from recipes.data.blend import BLEND_VERSION, BlendedSamples, Source
from recipes.data.chat_build import load_chat
from recipes.data.config import DataConfig
from recipes.data.indexed import IndexedDataset, content_hash
from recipes.data.packing import ORDER_VERSION, OrderedDataset, PackedDataset, split_documents
from recipes.data.same_files import require_other_tokens
from recipes.data.samples import Samples
from recipes.data.tokenise import ensure_tokenised, read_counts


@dataclass(frozen=True)
class TrainData:
    """Training and validation samples of a run.

    Attributes:
        train: Shuffled samples without end.
        validation: Samples in a fixed order.
        sources: Sources of a blend; none where there is one source of data.
        fingerprint: Hex sha256 of the tokens and of every setting that decides which tokens sample n holds. A
            checkpoint stores it, and a run cannot resume with other data.
    """

    train: Samples
    validation: Samples
    fingerprint: str
    sources: tuple[Source, ...] = ()

    @property
    def train_tokens(self) -> int:
        """Tokens in the training documents."""
        return self.train.num_tokens

    @property
    def validation_tokens(self) -> int:
        """Tokens in the validation documents."""
        return self.validation.num_tokens

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that samples are read from while training."""
        return tuple(dict.fromkeys((*self.train.files, *self.validation.files)))


def load_data(
    cfg: DataConfig,
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    vocab_size: int,
    log: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
) -> TrainData:
    """Tokenises documents that are not in the cache, checks that ids fit the model, splits and packs.

    Args:
        cfg: The data config.
        tokenizer_dir: A local tokenizer folder.
        cache_dir: Folder of the token files.
        vocab_size: Rows of the model's embedding.
        log: Takes lines on the progress.
        trust_remote_code: Whether the tokenizer may run code of its own.

    Raises:
        DataError: Documents cannot be read, ids do not fit the model, or there is less than one sample.
        DiskError: The cache cannot be written.
    """
    if cfg.blend:
        load = partial(load_data, trust_remote_code=trust_remote_code)
        return blend(cfg, [load(own, tokenizer_dir, cache_dir, vocab_size, log) for own in cfg.sources()])
    if cfg.format == "chat":
        chat = load_chat(cfg, tokenizer_dir, cache_dir, vocab_size, log, trust_remote_code=trust_remote_code)
        return TrainData(*chat)
    tokenised = partial(ensure_tokenised, trust_remote_code=trust_remote_code)
    prefix = tokenised(cfg, tokenizer_dir, cache_dir, log)
    check_ids(prefix, vocab_size)
    validation_prefix = None
    if cfg.validation_path is not None:
        validation_prefix = tokenised(cfg.of(cfg.validation_path), tokenizer_dir, cache_dir, log)
        check_ids(validation_prefix, vocab_size)
    return build_data(cfg, prefix, validation_prefix)


def build_data(cfg: DataConfig, prefix: str | Path, validation_prefix: str | Path | None = None) -> TrainData:
    """Splits and packs token files.

    Args:
        cfg: Sample length, split and seed.
        prefix: The token files of ``cfg.path``.
        validation_prefix: Token files of ``cfg.validation_path``; None splits by ``cfg.validation_fraction``.

    Raises:
        DataError: The files are damaged, or training or validation has less than one sample.
    """
    indexed = IndexedDataset(prefix)
    if validation_prefix is None:
        held_out, identity = indexed, [content_hash(indexed), cfg.validation_fraction]
        train_ids, validation_ids = split_documents(
            indexed.document_lengths, cfg.validation_fraction, cfg.seed, cfg.seq_len
        )
    else:
        held_out = IndexedDataset(validation_prefix)
        identity = [content_hash(indexed), content_hash(held_out)]
        require_other_tokens(*identity, cfg)
        train_ids, validation_ids = np.arange(indexed.num_documents), np.arange(held_out.num_documents)
    identity += [cfg.seq_len, cfg.seed, ORDER_VERSION]
    # Left out where documents see one another, as they did in runs from before the option.
    identity += ["document_mask"] if cfg.document_mask else []
    return TrainData(
        train=PackedDataset(indexed, cfg.seq_len, cfg.seed, train_ids, document_mask=cfg.document_mask),
        validation=OrderedDataset(
            held_out, cfg.seq_len, cfg.seed, validation_ids, document_mask=cfg.document_mask
        ),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )


def blend(cfg: DataConfig, parts: Sequence[TrainData]) -> TrainData:
    """Blends the data of several sources by the weights of a config.

    Args:
        cfg: Names, weights and seed.
        parts: The data of each source.
    """
    shares, names = cfg.shares, cfg.names
    sources = tuple(
        Source(name, share, part.train, part.validation, own.max_epochs)
        for name, share, part, own in zip(names, shares, parts, cfg.blend, strict=True)
    )
    identity = [
        BLEND_VERSION,
        cfg.seed,
        *([part.fingerprint, str(s)] for part, s in zip(parts, shares, strict=True)),
    ]
    return TrainData(
        train=BlendedSamples([part.train for part in parts], shares, cfg.seed),
        validation=BlendedSamples([part.validation for part in parts], shares, cfg.seed),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        sources=sources,
    )


def check_ids(prefix: str | Path, vocab_size: int) -> None:
    """Checks that the ids of token files fit a model; large files from elsewhere are sampled.

    Raises:
        DataError: An id is negative, or not below the vocabulary size.
    """
    counts = read_counts(prefix)
    low, high = IndexedDataset(prefix).token_range() if counts is None else (0, counts.max_token_id)
    if low < 0 or high >= vocab_size:
        raise DataError.one(
            "data.path",
            str(prefix),
            f"holds ids from {low} to {high}, and the model's vocabulary has {vocab_size} entries",
            "Tokenise with the tokenizer that the model was trained with.",
        )
