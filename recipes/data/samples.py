"""What samples are, whatever they were made from, and what they say of their tokens besides the ids.

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
    """What is known of the tokens of a batch.

    Attributes:
        weights_BS: fp32 weight of each target's loss: 1 or 0 as read, then a share of the step's mean.
        real_BS: Whether an input is a token, not padding.
        positions_BS: Place of each input in its conversation, from 0; None where conversations of a sample
            see one another, as documents of text do.
    """

    weights_BS: Tensor
    real_BS: Tensor
    positions_BS: Tensor | None

    def times(self, factor: float) -> TokenMetadata:
        """With weights times a factor."""
        return replace(self, weights_BS=self.weights_BS * factor)

    def after(self, count: int) -> TokenMetadata:
        """Of the samples behind the first."""
        positions = None if self.positions_BS is None else self.positions_BS[count:]
        return TokenMetadata(self.weights_BS[count:], self.real_BS[count:], positions)

    @staticmethod
    def together(parts: Sequence[TokenMetadata | None]) -> TokenMetadata | None:
        """Of all samples of some batches of one kind; None for samples of which nothing is known."""
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
        num_documents: Documents, or conversations, that they are drawn from.
        num_tokens: Tokens in them.
        samples_per_epoch: After so many, they come again.
    """

    seq_len: int
    num_documents: int
    num_tokens: int
    samples_per_epoch: int

    @property
    def files(self) -> tuple[Path, ...]:
        """What they are read from."""

    def sample(self, n: int) -> np.ndarray:
        """``[S + 1]`` int64: inputs are all but the last token, targets all but the first."""

    def batch(self, first: int, count: int) -> np.ndarray:
        """``[count, S + 1]`` int64: the samples first .. first + count - 1."""

    def metadata(self, first: int, count: int) -> TokenMetadata | None:
        """What is known of them; None where every token is real and every target counts alike."""

    def num_counted(self, first: int, count: int) -> int:
        """Targets in them that count for the loss."""
