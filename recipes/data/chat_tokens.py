"""Token files of chat data: ids, and flags for those that the assistant has written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe.errors import DataError, Mistake
from recipes.data.cache import cached_folder
from recipes.data.chat_template import ChatFormat
from recipes.data.config import DataConfig
from recipes.data.conversations import read_conversations
from recipes.data.indexed import IndexedDataset, IndexedWriter, disk_errors, token_dtype
from recipes.data.sources import fingerprint, resolve
from recipes.data.tokenizer import tokenizer_fingerprint, vocab_size_of
from recipes.runtime.atomic import write_synced
from recipes.runtime.progress import Progress

CHAT_VERSION = 2
"""To be increased whenever the same conversations, tokenizer and template give other files."""


@dataclass(frozen=True)
class ChatCounts:
    """Counts of a tokenisation.

    Attributes:
        conversations: Conversations written.
        left_out: Conversations without a token of the assistant's that counts.
        tokens: Tokens written.
        counted: Number of these that are the assistant's.
    """

    conversations: int
    left_out: int
    tokens: int
    counted: int


@dataclass(frozen=True)
class ChatTokens:
    """Token files of conversations.

    Attributes:
        ids: Token ids; each conversation is a document.
        counted: The same documents, with 1 for the assistant's tokens. The first token never counts, since
            nothing precedes it from which it could be predicted.
    """

    ids: IndexedDataset
    counted: IndexedDataset


def check_first_row(
    cfg: DataConfig, tokenizer_dir: str | Path, *, trust_remote_code: bool = False
) -> list[Mistake]:
    """Checks that the chat template takes the first conversation of paths that are right."""
    if cfg.format != "chat":
        return []
    try:
        rows = (row for file in resolve(cfg).files for row in read_conversations(file, cfg.ignored_fields))
        chat = ChatFormat(cfg, tokenizer_dir, trust_remote_code=trust_remote_code)
        if (first := next(rows, None)) is not None:
            chat.encode(first)
    except DataError as error:
        return list(error.mistakes)
    return []


def ensure_chat_tokens(
    cfg: DataConfig,
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    log: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
) -> ChatTokens:
    """Returns the token files of ``cfg.path``, and makes them first if the cache lacks them.

    Raises:
        DataError: A row is no conversation or does not fit the template, or there are no replies.
        DiskError: The cache cannot be written, or the disk is full.
    """
    chat = ChatFormat(cfg, tokenizer_dir, trust_remote_code=trust_remote_code)
    parts = (
        f"chat {CHAT_VERSION}",
        fingerprint(cfg),
        tokenizer_fingerprint(tokenizer_dir, trust_remote_code=trust_remote_code),
        chat.template,
        chat.tool_template,
    )
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
        f"reply that counts left out), kept in {final}"
    )


def tokenise_chat(
    cfg: DataConfig, chat: ChatFormat, folder: Path, log: Callable[[str], None] = print
) -> ChatCounts:
    """Writes ``ids`` and ``counted`` in a folder, streaming.

    Raises:
        DataError: See `ensure_chat_tokens`.
        DiskError: The disk is full or cannot be written.
    """
    sources = resolve(cfg)
    written = left_out = tokens = counted = 0
    unread: set[str] = set()
    with (
        Progress("tokenise", sources.num_bytes, "B", log) as progress,
        IndexedWriter(folder / "ids", token_dtype(vocab_size_of(chat.tokenizer))) as ids_writer,
        IndexedWriter(folder / "counted", np.uint8) as counted_writer,
    ):
        for file in sources.files:
            for conversation in read_conversations(file, cfg.ignored_fields):
                unread.update(conversation.unread)
                ids, own = chat.encode(conversation)
                own[:1] = False
                if own.any():
                    ids_writer.add_document(ids)
                    counted_writer.add_document(own.astype(np.uint8))
                    written, tokens, counted = written + 1, tokens + ids.size, counted + int(own.sum())
                else:
                    left_out += 1
                progress.update(conversation.consumed, f"{written + left_out} conversations, {tokens} tokens")
        if not written:
            # Raised inside the block, so that no empty files are committed.
            rule = f"holds {left_out} conversations, none with a reply of the assistant's"
            raise DataError.one("data.path", cfg.path, rule, "Name conversations with assistant messages.")
    if unread:
        log(f"data: fields of rows that are not read: {', '.join(sorted(unread))}")
    return ChatCounts(written, left_out, tokens, counted)
