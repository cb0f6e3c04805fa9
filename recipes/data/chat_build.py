"""Builds the chat samples of a run: split, cut and packed, with their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import DataError
from recipes.data.chat_samples import CHAT_ORDER_VERSION, ChatSamples, Cut, cut, require_replies
from recipes.data.chat_tokens import ChatTokens, ensure_chat_tokens
from recipes.data.config import DataConfig
from recipes.data.indexed import content_hash
from recipes.data.packing import split_documents
from recipes.data.same_files import require_other_tokens


def load_chat(
    cfg: DataConfig,
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    vocab_size: int,
    log: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
) -> tuple[ChatSamples, ChatSamples, str]:
    """Loads training and validation samples, and the fingerprint of everything that decides them.

    Args:
        cfg: The data config.
        tokenizer_dir: A local tokenizer folder.
        cache_dir: Folder of the token files.
        vocab_size: Rows of the model's embedding.
        log: Takes lines on the progress.
        trust_remote_code: Whether the tokenizer may run code of its own.

    Raises:
        DataError: Conversations cannot be read, ids do not fit the model, or no reply fits in a sample.
        DiskError: The cache cannot be written.
    """

    def load(path: Any) -> ChatTokens:
        own = replace(cfg, path=path, validation_path=None)
        chat = ensure_chat_tokens(own, tokenizer_dir, cache_dir, log, trust_remote_code=trust_remote_code)
        _check_ids(chat, path, vocab_size)
        return chat

    return build_chat(
        cfg, load(cfg.path), None if cfg.validation_path is None else load(cfg.validation_path), log
    )


def build_chat(
    cfg: DataConfig, chat: ChatTokens, held_out: ChatTokens | None, log: Callable[[str], None] = print
) -> tuple[ChatSamples, ChatSamples, str]:
    """Splits and packs token files; see `load_chat`.

    Args:
        cfg: Sample length, split and seed.
        chat: The conversations of ``cfg.path``.
        held_out: Conversations of ``cfg.validation_path``; None splits by ``cfg.validation_fraction``.
        log: Takes a line on the samples.

    Raises:
        DataError: Training or validation has no reply within a sample.
    """
    own = partial(ChatSamples, document_mask=cfg.document_mask)
    whole = cut(chat, cfg.seq_len)
    require_replies(whole.kept, cfg.seq_len)
    identity: list[Any] = [*_hashes(chat), cfg.seq_len, cfg.seed, CHAT_ORDER_VERSION]
    identity += [] if cfg.document_mask else ["no document_mask"]
    if held_out is None:
        held_out, identity = chat, [*identity, cfg.validation_fraction]
        train, validation = split_documents(whole.lengths, cfg.validation_fraction, cfg.seed, 0)
        parts = _part(whole, train), _part(whole, validation)
    else:
        other = cut(held_out, cfg.seq_len)
        identity += _hashes(held_out)
        require_other_tokens(content_hash(chat.ids), content_hash(held_out.ids), cfg)
        parts = (whole.kept, whole.lengths), (other.kept, other.lengths)
        _log_cut(other, cfg.seq_len, "validation ", log)
    _log_cut(whole, cfg.seq_len, "", log)
    samples = own(chat, cfg.seq_len, cfg.seed, *parts[0], shuffled=True)
    full = samples.num_tokens / (samples.samples_per_epoch * (cfg.seq_len + 1))
    log(
        f"data: {samples.num_documents} conversations in {samples.samples_per_epoch} samples of "
        f"{cfg.seq_len} + 1 tokens, {100 * full:.1f} % full"
    )
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return samples, own(held_out, cfg.seq_len, cfg.seed, *parts[1], shuffled=False), fingerprint


def _part(whole: Cut, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return whole.kept[places], whole.lengths[places]


def _hashes(chat: ChatTokens) -> list[str]:
    return [content_hash(chat.ids), content_hash(chat.counted)]


def _log_cut(found: Cut, seq_len: int, which: str, log: Callable[[str], None]) -> None:
    if found.longer:
        log(
            f"data: {found.longer} {which}conversations are longer than data.seq_len + 1 = {seq_len + 1} "
            f"tokens: {found.lost} tokens are cut off, and {found.dropped} conversations without a reply "
            "before that are left out"
        )


def _check_ids(chat: ChatTokens, path: Any, vocab_size: int) -> None:
    low, high = chat.ids.token_range()
    if low < 0 or high >= vocab_size:
        rule = f"gives ids from {low} to {high}, and the model's vocabulary has {vocab_size} entries"
        remedy = "Use the tokenizer that the model was trained with, or enlarge the model's embedding."
        raise DataError.one("data.path", path, rule, remedy)
