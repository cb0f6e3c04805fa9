"""Packs whole conversations into samples of one length.

Conversations go into samples of S + 1 tokens, the longest first, each where it leaves the least room (best
fit); the rest of a sample is padding. Longer conversations are cut. The packing depends only on the lengths;
the order of the samples depends on seed and epoch.

Letters: B samples, S sequence length, C conversations.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe.errors import DataError
from recipes.data.chat_tokens import ChatTokens
from recipes.data.packing import EPOCHS_KEPT, permutation
from recipes.data.samples import TokenMetadata

CHAT_ORDER_VERSION = 1
"""To be increased whenever the same tokens and settings are packed or ordered differently."""

# Purpose of the order; `packing` uses 0 to 2.
_CHAT_SAMPLES = 3


@dataclass(frozen=True)
class Cut:
    """Conversations cut to the length of a sample.

    Attributes:
        kept: ``[C]`` ids of the conversations that have a reply left, ascending.
        lengths: ``[C]`` number of tokens kept of each.
        longer: Number of conversations that were cut.
        dropped: Number of these without a reply left.
        lost: Number of tokens cut off.
    """

    kept: np.ndarray
    lengths: np.ndarray
    longer: int
    dropped: int
    lost: int


def cut(chat: ChatTokens, seq_len: int) -> Cut:
    """Cuts conversations to S + 1 tokens, and drops those that then have no reply."""
    room = seq_len + 1
    lengths = chat.ids.document_lengths
    offsets = chat.ids.document_offsets
    longer = np.flatnonzero(lengths > room)
    empty = [i for i in longer.tolist() if not chat.counted.tokens(offsets[i], offsets[i] + room).any()]
    kept = np.setdiff1d(np.arange(len(lengths)), empty, assume_unique=True)
    lost = int((lengths[longer] - room).sum())
    return Cut(kept, np.minimum(lengths, room)[kept], len(longer), len(empty), lost)


def require_replies(kept: np.ndarray, seq_len: int) -> None:
    """Checks that conversations are left after the cut.

    Raises:
        DataError: There is none.
    """
    if not len(kept):
        rule = f"no conversation has a reply within {seq_len} + 1 tokens"
        remedy = "Raise data.seq_len, or give more conversations."
        raise DataError.one("data.seq_len", seq_len, rule, remedy)


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Packs conversations into samples, best fit by decreasing length.

    Args:
        lengths: ``[C]`` tokens of each conversation, none above ``room``.
        room: Tokens of a sample.

    Returns:
        For each sample the indices of its conversations in ``lengths``.
    """
    samples: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, number = room, len(samples)
            samples.append([])
        else:
            space = spaces[at]
            number = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        samples[number].append(i)
        space -= length
        if space not in by_space:
            by_space[space] = []
            insort(spaces, space)
        by_space[space].append(number)
    return samples


class ChatSamples:
    """`recipes.data.samples.Samples` of conversations: sample n belongs to epoch ``n // samples_per_epoch``.

    Attributes:
        seq_len: S.
        num_documents: Number of conversations.
        num_tokens: Number of their tokens that are kept.
        samples_per_epoch: Number of samples that hold them.
    """

    def __init__(
        self,
        chat: ChatTokens,
        seq_len: int,
        seed: int,
        kept: np.ndarray,
        lengths: np.ndarray,
        *,
        shuffled: bool,
        document_mask: bool = True,
    ) -> None:
        """Packs; no token is touched yet.

        Args:
            chat: The token files.
            seq_len: S.
            seed: Seed of the order of the samples.
            kept: ``[C]`` ids of the conversations.
            lengths: ``[C]`` number of tokens taken of each, at most S + 1.
            shuffled: Whether each epoch has an order of its own; else samples keep the order of packing.
            document_mask: Whether `metadata` tells conversations apart.

        Raises:
            DataError: There is no conversation.
        """
        require_replies(kept, seq_len)
        self._chat, self._seed, self._shuffled = chat, seed, shuffled
        self._ids, self._lengths = kept, lengths
        self._packed = pack(lengths, seq_len + 1)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self.seq_len = seq_len
        self.num_documents = len(kept)
        self.num_tokens = int(lengths.sum())
        self.samples_per_epoch = len(self._packed)
        self._document_mask = document_mask

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that samples are read from."""
        return *self._chat.ids.files, *self._chat.counted.files

    def sample(self, n: int) -> np.ndarray:
        """Returns ``[S + 1]`` int64, with 0 as padding at the end."""
        out = np.zeros(self.seq_len + 1, dtype=np.int64)
        for begin, start, length in self._pieces(n):
            out[begin : begin + length] = self._chat.ids.tokens(start, start + length)
        return out

    def batch(self, first: int, count: int) -> np.ndarray:
        """Returns ``[count, S + 1]`` int64: the samples first .. first + count - 1."""
        return np.stack([self.sample(n) for n in range(first, first + count)])

    def metadata(self, first: int, count: int) -> TokenMetadata:
        """Returns the weights of targets, the padding mask, and positions in the conversations."""
        counted = np.stack([self._counted(n) for n in range(first, first + count)])
        real = np.zeros((count, self.seq_len + 1), dtype=np.bool_)
        positions = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            end = 0
            for begin, _, length in self._pieces(first + row):
                end = begin + length
                positions[row, begin:end] = np.arange(length)
            real[row, :end] = True
            positions[row, end:] = np.arange(self.seq_len + 1 - end)
        return TokenMetadata(
            weights_BS=torch.from_numpy(counted[:, 1:].astype(np.float32)),
            real_BS=torch.from_numpy(real[:, :-1].copy()),
            positions_BS=torch.from_numpy(positions[:, :-1].copy()) if self._document_mask else None,
        )

    def num_counted(self, first: int, count: int) -> int:
        """Counts the targets in samples that are the assistant's."""
        return sum(int(self._counted(n).sum()) for n in range(first, first + count))

    def _counted(self, n: int) -> np.ndarray:
        """Returns ``[S + 1]`` bool, True for the assistant's tokens; the first of a conversation never is."""
        out = np.zeros(self.seq_len + 1, dtype=np.bool_)
        for begin, start, length in self._pieces(n):
            out[begin : begin + length] = self._chat.counted.tokens(start, start + length)
        return out

    def _pieces(self, n: int) -> list[tuple[int, int, int]]:
        """Lists each conversation's start in the sample, its start in the file, and its length."""
        assert n >= 0, f"sample {n} comes before the first"
        epoch, place = divmod(n, self.samples_per_epoch)
        pieces, begin = [], 0
        for i in self._packed[self._order(epoch)[place]]:
            length = int(self._lengths[i])
            pieces.append((begin, int(self._chat.ids.document_offsets[self._ids[i]]), length))
            begin += length
        return pieces

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the indices of the packed samples in the order of an epoch."""
        if not self._shuffled:
            epoch = 0
        if epoch not in self._orders:
            size = self.samples_per_epoch
            order = permutation(size, self._seed, _CHAT_SAMPLES, epoch) if self._shuffled else np.arange(size)
            self._orders[epoch] = order
            while len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]
