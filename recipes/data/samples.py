"""Interface of samples, and the metadata of their tokens.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMetadata:
    """Metadata of the tokens of a batch.

    Attributes:
        weights_BS: fp32 weight of each target's loss: 1 or 0 when read, then its share of the step's mean.
        real_BS: True for tokens, False for padding.
        positions_BS: Position of each input in its conversation, from 0; None if the conversations of a
            sample see one another, as documents of text do.
    """

    weights_BS: Tensor
    real_BS: Tensor
    positions_BS: Tensor | None

    def times(self, factor: float) -> TokenMetadata:
        """Multiplies the weights by a factor."""
        return replace(self, weights_BS=self.weights_BS * factor)

    def after(self, count: int) -> TokenMetadata:
        """Drops the first ``count`` samples."""
        positions = None if self.positions_BS is None else self.positions_BS[count:]
        return TokenMetadata(self.weights_BS[count:], self.real_BS[count:], positions)

    @staticmethod
    def together(parts: Sequence[TokenMetadata | None]) -> TokenMetadata | None:
        """Concatenates the metadata of batches of one kind; returns None if they have none."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        positions = [part.positions_BS for part in known if part.positions_BS is not None]
        return TokenMetadata(
            torch.cat([part.weights_BS for part in known]),
            torch.cat([part.real_BS for part in known]),
            torch.cat(positions) if positions else None,
        )


class Samples(Protocol):
    """Samples of S + 1 tokens without end, a pure function of their number.

    Attributes:
        seq_len: S.
        num_documents: Number of documents, or conversations, that they are drawn from.
        num_tokens: Number of tokens in them.
        samples_per_epoch: Number of samples after which they repeat.
    """

    seq_len: int
    num_documents: int
    num_tokens: int
    samples_per_epoch: int

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that they are read from."""

    def sample(self, n: int) -> np.ndarray:
        """Returns ``[S + 1]`` int64: inputs are all but the last token, targets all but the first."""

    def batch(self, first: int, count: int) -> np.ndarray:
        """Returns ``[count, S + 1]`` int64: the samples first .. first + count - 1."""

    def metadata(self, first: int, count: int) -> TokenMetadata | None:
        """Returns their metadata; None if all tokens are real and all targets count alike."""

    def num_counted(self, first: int, count: int) -> int:
        """Counts the targets in them that count for the loss."""
