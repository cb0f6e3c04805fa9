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
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenMetadata:
    """Metadata of the tokens of a batch.

    Attributes:
        weights_BS: fp32 weight of each target's loss: 1 or 0 when read, then its share of the step's mean;
            None if all targets count alike.
        real_BS: True for tokens, False for padding; None if all are tokens.
        positions_BS: Position of each input in its document or conversation, from 0 at its beginning and at
            that of the sample; None if those of a sample see one another.
    """

    weights_BS: Tensor | None
    real_BS: Tensor | None
    positions_BS: Tensor | None

    def times(self, factor: float) -> TokenMetadata:
        """Multiplies the weights by a factor."""
        return self if self.weights_BS is None else replace(self, weights_BS=self.weights_BS * factor)

    def after(self, count: int) -> TokenMetadata:
        """Drops the first ``count`` samples."""
        return TokenMetadata(*(part if part is None else part[count:] for part in self._parts()))

    @staticmethod
    def together(parts: Sequence[TokenMetadata | None]) -> TokenMetadata | None:
        """Concatenates the metadata of batches of one data set, which know the same; None if nothing."""
        known = [part._parts() for part in parts if part is not None]
        if not known:
            return None
        joined = ([tensor for tensor in kind if tensor is not None] for kind in zip(*known, strict=True))
        return TokenMetadata(*(torch.cat(kind) if kind else None for kind in joined))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.weights_BS, self.real_BS, self.positions_BS


def begins_document(positions_BS: Tensor) -> Tensor:
    """Returns ``[B, S]`` bool, True where positions do not go on by one: a document begins."""
    return F.pad(positions_BS.diff(dim=1) != 1, (1, 0), value=True)


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
