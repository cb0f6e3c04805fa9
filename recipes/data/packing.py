"""Packs documents of any length into samples of one length, as a pure function of seed and sample number.

An epoch concatenates all documents in a shuffled order and cuts the stream every S tokens into samples of S +
1, so that neighbours share one token: the last target of one is the first input of the next. The samples are
then shuffled too. All tokens but the first and a tail shorter than S are targets once per epoch. The order
comes from the raw bits of PCG64, which numpy keeps the same across versions, unlike its shuffles.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe.errors import DataError
from recipes.data.indexed import IndexedDataset
from recipes.data.samples import TokenMetadata

ORDER_VERSION = 1
"""To be increased whenever the same tokens and settings are split or ordered differently."""

EPOCHS_KEPT = 2
"""Number of epochs whose order is cached; a batch at the end of an epoch needs two."""

_SPLIT, _DOCUMENTS, _SAMPLES = range(3)
"""Purposes of an order, each with random bits of its own."""


def permutation(size: int, seed: int, purpose: int, epoch: int = 0) -> np.ndarray:
    """Returns ``[size]`` int64, a shuffle of 0 .. size-1 that depends only on the arguments."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, purpose, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Epoch:
    """Order of one epoch: document ids, their ends in the stream, and the cuts in sample order."""

    documents: np.ndarray
    ends: np.ndarray
    samples: np.ndarray | None


class PackedDataset:
    """Samples of S + 1 tokens without end: sample n belongs to epoch ``n // samples_per_epoch``.

    Attributes:
        seq_len: S.
        num_documents: Number of documents it draws from.
        num_tokens: Number of tokens in them.
        samples_per_epoch: ``(num_tokens - 1) // S``.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        seed: int,
        documents: np.ndarray,
        *,
        document_mask: bool = False,
    ) -> None:
        """Prepares to read; no token is touched yet.

        Args:
            indexed: The token files.
            seq_len: S.
            seed: Seed of the order of documents and samples.
            documents: ``[n]`` ids of the documents to draw from.
            document_mask: Whether `metadata` tells documents apart.

        Raises:
            DataError: The documents hold less than one sample.
        """
        self._indexed = indexed
        self._documents = np.asarray(documents, dtype=np.int64)
        self._seed = seed
        self._document_mask = document_mask
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self.seq_len = seq_len
        self.num_documents = len(self._documents)
        self.num_tokens = int(self._lengths(self._documents).sum())
        self.samples_per_epoch = max(self.num_tokens - 1, 0) // seq_len
        if not self.samples_per_epoch:
            raise DataError.one(
                "data.seq_len", seq_len, *_too_short(self.num_documents, self.num_tokens, seq_len)
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that samples are read from."""
        return self._indexed.files

    def sample(self, n: int) -> np.ndarray:
        """Returns ``[S + 1]`` int64: inputs are all but the last token, targets all but the first."""
        epoch, start = self._place(n)
        return self._read(epoch, start)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Returns ``[count, S + 1]`` int64: the samples first .. first + count - 1."""
        out = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            out[row] = self.sample(first + row)
        return out

    def metadata(self, first: int, count: int) -> TokenMetadata | None:
        """Returns positions that restart with each document and sample, if documents are told apart.

        All tokens are real, and all targets count alike: the first token of a document too, which is the
        target of the last one of the document before it.
        """
        if not self._document_mask:
            return None
        rows = [self._positions(*self._place(n)) for n in range(first, first + count)]
        return TokenMetadata(None, None, torch.from_numpy(np.stack(rows)))

    def num_counted(self, first: int, count: int) -> int:
        """Counts the targets in samples, all of which count for the loss."""
        return count * self.seq_len

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        offsets = self._indexed.document_offsets
        lengths: np.ndarray = offsets[documents + 1] - offsets[documents]
        return lengths

    def _epoch(self, number: int) -> _Epoch:
        if number in self._epochs:
            self._epochs.move_to_end(number)
        else:
            self._epochs[number] = self._arrange(number)
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _arrange(self, number: int) -> _Epoch:
        """Computes the order of an epoch."""
        documents = self._documents[permutation(self.num_documents, self._seed, _DOCUMENTS, number)]
        samples = permutation(self.samples_per_epoch, self._seed, _SAMPLES, number)
        return _Epoch(documents, np.cumsum(self._lengths(documents)), samples)

    def _place(self, n: int) -> tuple[_Epoch, int]:
        """Finds the epoch of a sample, and where it starts in that epoch's stream."""
        assert n >= 0, f"sample {n} comes before the first"
        number, place = divmod(n, self.samples_per_epoch)
        epoch = self._epoch(number)
        cut = place if epoch.samples is None else int(epoch.samples[place])
        return epoch, cut * self.seq_len

    def _pieces(self, epoch: _Epoch, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the documents of a stretch of the stream, their begins, and how much of each lies in it."""
        first = np.searchsorted(epoch.ends, start, side="right")
        last = np.searchsorted(epoch.ends, stop, side="left")
        documents, ends = epoch.documents[first : last + 1], epoch.ends[first : last + 1]
        begins = ends - self._lengths(documents)
        return documents, begins, np.minimum(ends, stop) - np.maximum(begins, start)

    def _read(self, epoch: _Epoch, start: int) -> np.ndarray:
        """Reads the S + 1 tokens of the stream from ``start``."""
        stop = start + self.seq_len + 1
        documents, begins, counts = self._pieces(epoch, start, stop)
        # Index in the stream -> index in the file: one shift per document, the same for all its tokens.
        shifts = np.repeat(self._indexed.document_offsets[documents] - begins, counts)
        return self._indexed.gather(np.arange(start, stop) + shifts)

    def _positions(self, epoch: _Epoch, start: int) -> np.ndarray:
        """Returns ``[S]`` int64, the positions of inputs in the parts of documents that the sample has."""
        stop = start + self.seq_len
        _, begins, counts = self._pieces(epoch, start, stop)
        positions: np.ndarray = np.arange(start, stop) - np.repeat(np.maximum(begins, start), counts)
        return positions


class OrderedDataset(PackedDataset):
    """Packed samples without shuffling: documents and samples in order, all epochs alike."""

    def _epoch(self, number: int) -> _Epoch:
        return super()._epoch(0)

    def _arrange(self, number: int) -> _Epoch:
        return _Epoch(self._documents, np.cumsum(self._lengths(self._documents)), None)


def split_documents(
    lengths: np.ndarray, fraction: float, seed: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sets random whole documents aside for validation, up to a share of all tokens.

    Documents longer than the whole share stay in training; if all are longer, the shortest one that is not
    empty is set aside.

    Args:
        lengths: ``[documents]`` tokens of each.
        fraction: Share of the tokens for validation, in (0, 1), approached from below.
        seed: Seed of the choice.
        seq_len: S; each side must hold at least one sample of S + 1 tokens.

    Returns:
        The ids of the training and of the validation documents, both ascending.

    Raises:
        DataError: There are fewer than two documents with text, or a side holds less than one sample.
    """
    full = np.count_nonzero(lengths)
    if full < 2:
        remedy = "Give validation documents by data.validation_path, or cut the document into several."
        raise DataError.one("data.path", f"{full} documents", "cannot be split for validation", remedy)
    order = permutation(len(lengths), seed, _SPLIT)
    target = fraction * int(lengths.sum())
    validation = np.sort(_fill_share(lengths, order, target))
    train = np.setdiff1d(np.arange(len(lengths)), validation, assume_unique=True)
    for side, ids in (("training", train), ("validation", validation)):
        tokens = int(lengths[ids].sum())
        if tokens < seq_len + 1:
            rule, remedy = _too_short(len(ids), tokens, seq_len)
            raise DataError.one("data.validation_fraction", fraction, f"for {side}, {rule}", remedy)
    return train, validation


def _fill_share(lengths: np.ndarray, order: np.ndarray, target: float) -> np.ndarray:
    """Chooses document ids in this order, skipping those that would exceed the target sum of lengths."""
    chosen, room, rest = [order[:0]], target, order
    while (rest := rest[lengths[rest] <= room]).size:
        count = int(np.searchsorted(np.cumsum(lengths[rest]), room, side="right"))
        chosen.append(rest[:count])
        room -= int(lengths[rest[:count]].sum())
        rest = rest[count:]
    ids = np.concatenate(chosen)
    if lengths[ids].any():
        return ids
    full = order[lengths[order] > 0]
    return full[[np.argmin(lengths[full])]]


def rank_slice(
    first_sample_of_step: int, micro_index: int, micro_batch_size: int, rank: int, world: int
) -> tuple[int, int]:
    """Computes the samples of a rank, such that a step sees the same samples for any number of ranks.

    A micro-batch takes the next ``world * micro_batch_size`` samples of the step; rank r takes the r-th part.

    Args:
        first_sample_of_step: ``step * global_batch_size``.
        micro_index: Index of the micro-batch within the step.
        micro_batch_size: Samples per rank.
        rank: Rank of this process among those with different data.
        world: Number of these ranks.

    Returns:
        The first sample and the count, for `PackedDataset.batch`.
    """
    assert 0 <= rank < world, f"rank {rank} of {world}"
    return first_sample_of_step + (micro_index * world + rank) * micro_batch_size, micro_batch_size


def _too_short(documents: int, tokens: int, seq_len: int) -> tuple[str, str]:
    """Returns the rule broken by data of less than one sample, and the remedy."""
    rule = f"{documents} documents of {tokens} tokens in all are less than one sample of {seq_len} + 1 tokens"
    return rule, "Give more documents, a smaller data.seq_len, or another share or path for validation."
