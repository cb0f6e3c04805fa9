"""Token files in Megatron's format: a ``.bin`` of token ids and an ``.idx`` with the bounds of documents.

The ``.idx``, little-endian throughout: 9 bytes ``MMIDIDX\\0\\0``; u64 version, 1; u8 code of the token type;
u64 number of sequences; u64 number of document boundaries (documents + 1); i32 length of each sequence in
tokens; i64 byte offset of each sequence in the ``.bin``; i64 boundaries, counted in sequences, from 0; in
multimodal files only, an i8 mode of each sequence. A document is a run of sequences; the writer makes one
each.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from moe.errors import DataError, DiskError
from recipes.runtime.atomic import disk_mistake, rename_file, sync_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's code of each integer type. Codes 6 and 7 are floats, which no token id is."""

SCAN_BLOCKS = 256
SCAN_BLOCK_TOKENS = 1 << 18
"""Largest file, in blocks, that is scanned whole (64 Mi tokens); in larger ones this many are sampled."""

SAMPLED_BLOCKS = 64
SAMPLED_TOKENS = 4096
"""Number and length of the evenly spaced blocks of tokens that are hashed."""

_REMEDY = "Tokenise again (python -m tools.tokenize), or name a pair written by Megatron's preprocess_data."
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns Megatron's type for the ids of a vocabulary: two bytes below 65500 entries, else four."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    """Returns ``PREFIX.bin``; a prefix may contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Returns ``PREFIX.idx``; a prefix may contain dots."""
    return Path(f"{prefix}.idx")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of a full or unwritable disk into a `DiskError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskError([disk_mistake(path, error)]) from error


class IndexedWriter:
    """Writer of documents; the pair appears under its name only when it is complete.

    As a context manager, it commits on a normal exit and removes everything on an exception. A killed process
    leaves only hidden ``*.tmp-*`` files, which no reader takes for a pair.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        """Prepares to write ``PREFIX.bin`` and ``PREFIX.idx``; nothing is created before entering.

        Args:
            prefix: The path of the pair without suffix. Missing parent folders are created.
            dtype: An integer type of at most eight bytes; see `token_dtype`.
        """
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in TOKEN_TYPES.items()}
        assert self.dtype in codes, (
            f"{self.dtype} is not one of the token types {sorted(TOKEN_TYPES.values())}"
        )
        self._code = codes[self.dtype]
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        mark = f"tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._bin_tmp = self._bin.with_name(f".{self._bin.name}.{mark}")
        self._idx_tmp = self._idx.with_name(f".{self._idx.name}.{mark}")
        self._lengths = array("i")
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        with disk_errors(self._bin):
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._bin_tmp.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None, "the writer was never entered"
        try:
            with disk_errors(self._bin):
                if kind is None:
                    self._commit(self._stream)
        finally:
            # After an error of the disk itself, close() may fail again on what is still buffered.
            with contextlib.suppress(OSError):
                self._stream.close()
            self._bin_tmp.unlink(missing_ok=True)
            self._idx_tmp.unlink(missing_ok=True)

    def add_document(self, tokens: ArrayLike) -> None:
        """Appends one document, ``[n]`` token ids."""
        values = np.asarray(tokens)
        self.add_documents(values, [values.size])

    def add_documents(self, tokens: ArrayLike, lengths: ArrayLike) -> None:
        """Appends many documents at once.

        Args:
            tokens: ``[n]`` ids of all of them, one document after another.
            lengths: Tokens of each; they sum to n.

        Raises:
            DiskError: The disk is full or cannot be written.
        """
        assert self._stream is not None, "documents are added inside the with block"
        values, counts = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        assert counts.sum() == values.size, f"lengths sum to {counts.sum()}, not to {values.size} tokens"
        assert not counts.size or counts.max() < 2**31, (
            f"a document of {counts.max()} tokens does not fit in int32"
        )
        if values.size:
            limits, low, high = np.iinfo(self.dtype), values.min(), values.max()
            assert limits.min <= low and high <= limits.max, f"ids {low} to {high} do not fit in {self.dtype}"
        with disk_errors(self._bin):
            self._stream.write(values.astype(self.dtype).tobytes())
        self._lengths.frombytes(counts.astype(np.intc).tobytes())

    def _commit(self, stream: BinaryIO) -> None:
        """Makes both files durable and names them, the index last."""
        sync_file(stream)
        with self._idx_tmp.open("xb") as index:
            self._write_index(index)
            sync_file(index)
        # An earlier pair's index is removed first: it must never exist beside the new tokens.
        self._idx.unlink(missing_ok=True)
        rename_file(self._bin_tmp, self._bin)
        rename_file(self._idx_tmp, self._idx)

    def _write_index(self, index: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        ends = np.cumsum(lengths, dtype=np.int64)
        index.write(HEADER.pack(MAGIC, VERSION, self._code, lengths.size, lengths.size + 1))
        index.write(lengths.astype("<i4").tobytes())
        index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
        index.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())


class IndexedDataset:
    """Reader of a ``.bin``/``.idx`` pair by memory mapping.

    Attributes:
        prefix: The path of the pair without suffix.
        dtype: The type of the stored ids.
        document_offsets: ``[documents + 1]`` int64, where each document begins, in tokens, and the end.
    """

    prefix: Path
    dtype: np.dtype
    document_offsets: np.ndarray

    def __init__(self, prefix: str | Path) -> None:
        """Opens the pair and checks that it is whole.

        Raises:
            DataError: A file is missing, truncated, or not of this format; the message names it.
        """
        self.prefix = Path(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise _wrong(path, "does not exist", "A prefix needs both its .bin and its .idx.")
        self.dtype, self.document_offsets = read_index(idx_path(prefix))
        expected, actual = self.num_tokens * self.dtype.itemsize, bin_path(prefix).stat().st_size
        if actual != expected:
            raise _wrong(bin_path(prefix), f"holds {actual} bytes where its index promises {expected}")
        self._tokens = _mapped(bin_path(prefix), self.dtype, 0, self.num_tokens)

    @property
    def files(self) -> tuple[Path, Path]:
        """Both files of the pair."""
        return bin_path(self.prefix), idx_path(self.prefix)

    @property
    def num_documents(self) -> int:
        """Number of documents in the pair, including empty ones."""
        return len(self.document_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the pair."""
        return int(self.document_offsets[-1])

    @property
    def document_lengths(self) -> np.ndarray:
        """Number of tokens of each document, ``[documents]`` int64."""
        return np.diff(self.document_offsets)

    def document(self, i: int) -> np.ndarray:
        """Returns the ids of document i, a view of the file."""
        assert 0 <= i < self.num_documents, f"document {i} of {self.num_documents}"
        return self.tokens(int(self.document_offsets[i]), int(self.document_offsets[i + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids ``[start, stop)`` of the concatenated documents, a view of the file."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) of {self.num_tokens}"
        return self._tokens[start:stop]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Returns the ids at these indices of the concatenated documents, copied as int64."""
        return np.asarray(self._tokens[indices], dtype=np.int64)

    def token_range(self) -> tuple[int, int]:
        """Returns the smallest and largest id, of all tokens up to 64 Mi, else of evenly spaced blocks."""
        if not self.num_tokens:
            return 0, 0
        blocks = -(-self.num_tokens // SCAN_BLOCK_TOKENS)
        picked = np.unique(np.linspace(0, blocks - 1, min(blocks, SCAN_BLOCKS)).astype(np.int64))
        low, high = [], []
        for block in picked:
            values = self._tokens[block * SCAN_BLOCK_TOKENS : (block + 1) * SCAN_BLOCK_TOKENS]
            low.append(int(values.min()))
            high.append(int(values.max()))
        return min(low), max(high)


def _mapped(path: Path, dtype: DTypeLike, offset: int, count: int) -> np.ndarray:
    """Maps ``[count]`` items of a file from a byte offset, read-only; numpy cannot map zero items."""
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def _wrong(path: Path, rule: str, remedy: str = _REMEDY) -> DataError:
    return DataError.one("token file", str(path), rule, remedy)


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Reads the token type and the document offsets, in tokens, of an ``.idx`` file.

    Raises:
        DataError: It is damaged, or no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise _wrong(path, f"begins with {head[:9]!r}, not as a Megatron index does")
    if len(head) < HEADER.size:
        raise _wrong(path, f"ends within its header, after {size} bytes")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != VERSION:
        raise _wrong(path, f"has version {version} of the format, and only {VERSION} is known")
    if code not in TOKEN_TYPES:
        raise _wrong(path, f"has the token type {code}, which is no integer type")
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    # One further byte a sequence is the mode in multimodal files, which we have no use for.
    if size not in (needed, needed + sequences):
        raise _wrong(path, f"holds {size} bytes where its header promises {needed}")
    dtype = np.dtype(TOKEN_TYPES[code])
    lengths = _mapped(path, "<i4", HEADER.size, sequences)
    pointers = _mapped(path, "<i8", HEADER.size + 4 * sequences, sequences)
    bounds = _mapped(path, "<i8", HEADER.size + 12 * sequences, boundaries)
    offsets = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    whole = bounds.size and bounds[0] == 0 and bounds[-1] == sequences
    whole = whole and (bounds[:-1] <= bounds[1:]).all()  # differences could overflow
    if not whole or (sequences and lengths.min() < 0):
        raise _wrong(path, "has document boundaries or lengths that make no sense")
    if not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
        raise _wrong(path, "has sequences that do not lie one after another")
    return dtype, offsets[bounds]


def content_hash(indexed: IndexedDataset) -> str:
    """Computes a hex sha256 of the index and of sampled tokens, which copies of the files share."""
    total = hashlib.sha256()
    with idx_path(indexed.prefix).open("rb") as stream:
        while block := stream.read(1 << 24):
            total.update(block)
    last = max(indexed.num_tokens - SAMPLED_TOKENS, 0)
    for start in np.unique(np.linspace(0, last, SAMPLED_BLOCKS).astype(np.int64)).tolist():
        total.update(indexed.tokens(start, min(start + SAMPLED_TOKENS, indexed.num_tokens)).tobytes())
    return total.hexdigest()
