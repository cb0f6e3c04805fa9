"""Token files of chat data: ids, and beside them which of them the assistant has written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe.errors import DataError
from recipes.data.cache import cached_folder
from recipes.data.chat_template import ChatFormat
from recipes.data.config import DataConfig
from recipes.data.conversations import read_conversations
from recipes.data.indexed import IndexedDataset, IndexedWriter, disk_errors, token_dtype
from recipes.data.sources import fingerprint, resolve
from recipes.data.token_progress import Progress
from recipes.data.tokenizer import tokenizer_fingerprint, vocab_size_of
from recipes.runtime.atomic import write_synced

CHAT_VERSION = 1
"""Raised whenever the same conversations, tokenizer and template would give other files."""


@dataclass(frozen=True)
class ChatCounts:
    """What tokenising has done.

    Attributes:
        conversations: Written.
        left_out: Without a token of the assistant's.
        tokens: Written.
        counted: The assistant's among them.
    """

    conversations: int
    left_out: int
    tokens: int
    counted: int


@dataclass(frozen=True)
class ChatTokens:
    """The token files of some conversations.

    Attributes:
        ids: A conversation is a document.
        counted: The same documents, 1 where the token is the assistant's. The first token never is: nothing
            comes before it that it could be told from.
    """

    ids: IndexedDataset
    counted: IndexedDataset


def ensure_chat_tokens(
    cfg: DataConfig, tokenizer_dir: str | Path, cache_dir: str | Path, log: Callable[[str], None] = print
) -> ChatTokens:
    """The token files of ``cfg.path``, made now unless the cache has them.

    Raises:
        DataError: A row is no conversation or does not fit the template, or there is nothing to learn in any.
        DiskError: The cache may not be written to, or the disk is full.
    """
    chat = ChatFormat(cfg, tokenizer_dir)
    parts = (f"chat {CHAT_VERSION}", fingerprint(cfg), tokenizer_fingerprint(tokenizer_dir), chat.template)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    folder = cached_folder(cache_dir, key, lambda folder, final: _fill(folder, final, cfg, chat, log), log)
    return ChatTokens(IndexedDataset(folder / "ids"), IndexedDataset(folder / "counted"))


def _fill(folder: Path, final: Path, cfg: DataConfig, chat: ChatFormat, log: Callable[[str], None]) -> None:
    started = time.perf_counter()
    counts = tokenise_chat(cfg, chat, folder, log)
    with disk_errors(final):
        write_synced(folder / "chat.json", json.dumps(asdict(counts), indent=2).encode())
    log(
        f"data: tokenised {counts.conversations} conversations to {counts.tokens} tokens, {counts.counted} "
        f"of them the assistant's, in {time.perf_counter() - started:.1f} s ({counts.left_out} without a "
        f"reply left out), kept in {final}"
    )


def tokenise_chat(
    cfg: DataConfig, chat: ChatFormat, folder: Path, log: Callable[[str], None] = print
) -> ChatCounts:
    """Writes ``ids`` and ``counted`` in a folder, streaming.

    Raises:
        DataError: As `ensure_chat_tokens`.
        DiskError: The disk is full or may not be written to.
    """
    sources = resolve(cfg)
    written = left_out = tokens = counted = 0
    with (
        Progress("tokenise", sources.num_bytes, log) as progress,
        IndexedWriter(folder / "ids", token_dtype(vocab_size_of(chat.tokenizer))) as ids_writer,
        IndexedWriter(folder / "counted", np.uint8) as counted_writer,
    ):
        for file in sources.files:
            for conversation in read_conversations(file):
                ids, own = chat.encode(conversation)
                own[:1] = False
                progress.update(1, ids.size, conversation.consumed)
                if not own.any():
                    left_out += 1
                    continue
                ids_writer.add_document(ids)
                counted_writer.add_document(own.astype(np.uint8))
                written, tokens, counted = written + 1, tokens + ids.size, counted + int(own.sum())
        if not written:
            # Raised inside the block, so that no files of nothing are committed.
            rule = f"holds {left_out} conversations, none with a reply of the assistant's"
            raise DataError.one("data.path", cfg.path, rule, "Name conversations with assistant messages.")
    return ChatCounts(written, left_out, tokens, counted)
