"""Tokenises documents to token files, and caches the result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe.errors import DataError
from recipes.data.cache import cached_folder, entry_fault
from recipes.data.config import DataConfig
from recipes.data.documents import Document
from recipes.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    disk_errors,
    token_dtype,
)
from recipes.data.sources import fingerprint, read_documents, resolve
from recipes.data.tokenizer import (
    encode_texts,
    first_tokens,
    load_tokenizer,
    require_room,
    tokenizer_fingerprint,
    vocab_size_of,
)
from recipes.runtime.atomic import write_synced
from recipes.runtime.machine_memory import address_space_left
from recipes.runtime.progress import Progress
from recipes.runtime.user_json import UserJsonError, read_json_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 2
"""To be increased whenever the same documents and tokenizer give other token files."""

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 21
"""Limits of a batch for the tokenizer, which bound memory whatever the documents."""


@dataclass(frozen=True)
class TokenCounts:
    """Counts of a tokenisation.

    Attributes:
        documents: Documents written.
        empty_documents: Documents without text, which are left out.
        tokens: Tokens written, including those that begin and end documents.
        text_bytes: Bytes of text read, as UTF-8.
        max_token_id: The largest id written; -1 if there is none.
        seconds: Wall time.
        begin: The tokens that each document begins with, such as ``<bos>``; empty if there are none.
    """

    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    seconds: float
    begin: str = ""


def tokenise(
    cfg: DataConfig,
    tokenizer_dir: str | Path,
    prefix: str | Path,
    log: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
) -> TokenCounts:
    """Tokenises the documents of ``cfg.path`` into ``PREFIX.bin`` and ``PREFIX.idx``, streaming.

    Args:
        cfg: Which documents, and which tokens begin and close each.
        tokenizer_dir: A local folder that transformers' AutoTokenizer loads.
        prefix: The path of the pair without suffix; an earlier pair is replaced when the new one is whole.
        log: Takes progress where stderr is no terminal.
        trust_remote_code: Whether the tokenizer may run code of its own.

    Raises:
        DataError: A file cannot be read, the tokenizer is not usable, or there is no text at all.
        DiskError: The disk is full or may not be written to.
    """
    started = time.perf_counter()
    sources = resolve(cfg)
    tokenizer = load_tokenizer(tokenizer_dir, cfg.append_eos, trust_remote_code=trust_remote_code)
    bos = first_tokens(tokenizer, cfg.prepend_bos)
    eos = [tokenizer.eos_token_id] if cfg.append_eos else []
    written = empty = tokens = text_bytes = 0
    max_token_id = -1
    with (
        Progress("tokenise", sources.num_bytes, "B", log) as progress,
        IndexedWriter(prefix, token_dtype(vocab_size_of(tokenizer))) as writer,
    ):
        characters = BATCH_CHARACTERS if address_space_left() is None else BATCH_CHARACTERS // 32
        for batch in _batches(read_documents(cfg, log), characters):
            texts = [document.text for document in batch if document.text]
            flat, lengths = _encode(tokenizer, texts, bos, eos)
            writer.add_documents(flat, lengths)
            written += len(texts)
            empty += len(batch) - len(texts)
            tokens += flat.size
            text_bytes += sum(len(text.encode()) for text in texts)
            max_token_id = max(max_token_id, int(flat.max(initial=-1)))
            consumed = sum(document.consumed for document in batch)
            progress.update(consumed, f"{written + empty} documents, {tokens} tokens")
        if not tokens:
            # Raised inside the block, so that no empty pair is committed.
            raise DataError.one(
                "data.path", cfg.path, "holds no text", "Name documents that are not all empty."
            )
    seconds, begin = time.perf_counter() - started, "".join(tokenizer.convert_ids_to_tokens(bos))
    return TokenCounts(written, empty, tokens, text_bytes, max_token_id, seconds, begin)


def ensure_tokenised(
    cfg: DataConfig,
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    log: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Returns the prefix of the token files of ``cfg.path``; tokenises first if the cache lacks them.

    Args:
        cfg: The documents. The prefix of a token file is returned unchanged.
        tokenizer_dir: A local tokenizer folder; its contents, not its path, are part of the key.
        cache_dir: The cache, see `cached_folder`; created if missing.
        log: Takes a line on the outcome, and progress.
        trust_remote_code: Whether the tokenizer may run code of its own.

    Raises:
        DataError: See `tokenise`.
        DiskError: The cache cannot be written, or the disk is full.
    """
    sources = resolve(cfg)
    if sources.kind == "indexed":
        log(f"data: {sources.files[0]} is tokenised already and used unchanged")
        return sources.files[0]
    tokenizer = tokenizer_fingerprint(tokenizer_dir, trust_remote_code=trust_remote_code)
    parts = (str(CACHE_VERSION), fingerprint(cfg), tokenizer)
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]

    def make(folder: Path) -> TokenCounts:
        return tokenise(cfg, tokenizer_dir, folder / "tokens", log, trust_remote_code=trust_remote_code)

    entry = cached_folder(cache_dir, key, lambda folder, final: _fill(folder, final, make, log), log)
    IndexedDataset(entry / "tokens")
    return entry / "tokens"


def read_counts(prefix: str | Path) -> TokenCounts | None:
    """Reads the counts of a cache entry; None for token files from elsewhere, whatever lies beside them."""
    folder = Path(prefix).parent
    if Path(prefix).name != "tokens" or entry_fault(folder) is not None:
        return None
    try:
        return TokenCounts(**read_json_file(folder / "counts.json"))
    except (TypeError, UserJsonError):
        return None


def _fill(folder: Path, final: Path, make: Callable[[Path], TokenCounts], log: Callable[[str], None]) -> None:
    """Makes a cache entry."""
    counts = make(folder)
    with disk_errors(final):
        write_synced(folder / "counts.json", json.dumps(asdict(counts), indent=2).encode())
    log(
        f"data: tokenised {counts.documents} documents to {counts.tokens} tokens in {counts.seconds:.1f} s "
        f"({counts.empty_documents} empty ones left out), "
        f"{f'each after {counts.begin}' if counts.begin else 'without a token before each'}, kept in {final}"
    )


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], bos: list[int], eos: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the concatenated ids of all texts, int64, and the number of each."""
    if not texts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    require_room(sum(map(len, texts)))
    lists = [bos + ids + eos for ids in encode_texts(tokenizer, texts, special_tokens=False)]
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    flat = np.fromiter((token for ids in lists for token in ids), dtype=np.int64, count=int(lengths.sum()))
    return flat, lengths
