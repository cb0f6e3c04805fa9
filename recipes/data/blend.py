"""Blends samples of several sources by weights, as a pure function of seed and sample number.

The n-th sample belongs to block ``n // BLOCK``. In each block every source has a fixed number of samples, in
an order drawn from the seed. The numbers round the shares such that at the end of a block no source is off by
a whole sample, however many blocks there are. A source's samples come in its own order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from recipes.data.config import BLOCK
from recipes.data.packing import EPOCHS_KEPT, permutation
from recipes.data.samples import Samples, TokenMetadata

BLEND_VERSION = 1
"""To be increased whenever the same sources and settings are blended differently."""

# Purpose of the order; `packing` uses 0 to 2, `chat_samples` 3.
_BLEND = 4


@dataclass(frozen=True)
class Source:
    """Source of a blend.

    Attributes:
        name: Its name in metrics and messages.
        share: Its share of the samples, exact; shares sum to 1.
        train: Its training samples.
        validation: Its validation samples.
        max_epochs: Most passes over its training samples; None for any number.
    """

    name: str
    share: Fraction
    train: Samples
    validation: Samples
    max_epochs: float | None = None


def counts(parts: Sequence[Fraction], samples: int) -> np.ndarray:
    """Returns ``[sources]`` int64, how many of so many samples each source gives; they sum to all.

    Bounds between sources are rounded, so that a number never falls when a `BLOCK` is added.
    """
    bounds = [Fraction(0)]
    for part in parts:
        bounds.append(bounds[-1] + part)
    ends = [(2 * samples * b.numerator + b.denominator) // (2 * b.denominator) for b in bounds]
    return np.diff(np.array(ends, dtype=np.int64))


class BlendedSamples:
    """`recipes.data.samples.Samples` of several sources; they never repeat as a whole.

    Attributes:
        seq_len: S.
        num_documents: Documents of all sources.
        num_tokens: Tokens in them.
        samples_per_epoch: Samples of one epoch of every source.
    """

    def __init__(self, sources: Sequence[Samples], parts: Sequence[Fraction], seed: int) -> None:
        """Prepares to read; no token is touched yet.

        Args:
            sources: Samples of one length.
            parts: Exact share of each; they sum to 1, and none is below 1 / `BLOCK`.
            seed: Seed of the order within a block.
        """
        assert sum(parts) == 1 and min(parts) * BLOCK >= 1, parts
        self._sources, self._parts, self._seed = list(sources), list(parts), seed
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.seq_len = sources[0].seq_len
        self.num_documents = sum(each.num_documents for each in sources)
        self.num_tokens = sum(each.num_tokens for each in sources)
        self.samples_per_epoch = sum(each.samples_per_epoch for each in sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that samples are read from."""
        return tuple(dict.fromkeys(path for each in self._sources for path in each.files))

    def place(self, n: int) -> tuple[int, int]:
        """Returns the source of a sample, and its number there."""
        assert n >= 0, f"sample {n} comes before the first"
        block, at = divmod(n, BLOCK)
        sources, numbers = self._block(block)
        return int(sources[at]), int(numbers[at])

    def sample(self, n: int) -> np.ndarray:
        """Returns ``[S + 1]`` int64: inputs are all but the last token, targets all but the first."""
        source, number = self.place(n)
        return self._sources[source].sample(number)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Returns ``[count, S + 1]`` int64: the samples first .. first + count - 1."""
        return np.stack([self.sample(n) for n in range(first, first + count)])

    def metadata(self, first: int, count: int) -> TokenMetadata | None:
        """Returns the metadata of samples, which all sources know alike."""
        places = [self.place(n) for n in range(first, first + count)]
        return TokenMetadata.together([self._sources[source].metadata(n, 1) for source, n in places])

    def num_counted(self, first: int, count: int) -> int:
        """Counts the targets in samples, all of which count for the loss."""
        return count * self.seq_len

    def drawn(self, first: int, count: int) -> np.ndarray:
        """Returns ``[sources]`` int64, how many of the samples first .. first + count - 1 each has given."""
        return self._before(first + count) - self._before(first)

    def _before(self, n: int) -> np.ndarray:
        block, at = divmod(n, BLOCK)
        total = counts(self._parts, block * BLOCK)
        if at:
            total += np.bincount(self._block(block)[0][:at], minlength=len(total))
        return total

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each place of a block the source, and the number of the sample there."""
        if block not in self._blocks:
            self._blocks[block] = self._arrange(block)
            while len(self._blocks) > EPOCHS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        begin = counts(self._parts, block * BLOCK)
        own = counts(self._parts, (block + 1) * BLOCK) - begin
        sources = np.repeat(np.arange(len(own)), own)[permutation(BLOCK, self._seed, _BLEND, block)]
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source, (start, size) in enumerate(zip(begin.tolist(), own.tolist(), strict=True)):
            numbers[sources == source] = np.arange(start, start + size)
        return sources, numbers
