"""Samples of one forward pass, and the loss of a model on them.

Letters: B samples of a micro-batch, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recipes.data.samples import TokenMetadata


@dataclass(frozen=True)
class MicroBatch:
    """Samples that a rank sees in one forward pass.

    Attributes:
        tokens_BS1: ``[B, S + 1]`` ids; the last S are the targets of the first S.
        metadata: Weights, padding and positions of the tokens. The weights are such that the mean over ranks
            and micro-batches of the weighted sums is the step's loss. None: all tokens count alike.
    """

    tokens_BS1: Tensor
    metadata: TokenMetadata | None = None


def batch_loss(losses_BS: Tensor, metadata: TokenMetadata | None) -> Tensor:
    """Returns the mean of a micro-batch's losses, or their weighted sum where its tokens have weights."""
    weights_BS = None if metadata is None else metadata.weights_BS
    return losses_BS.mean() if weights_BS is None else (losses_BS * weights_BS.to(losses_BS)).sum()
