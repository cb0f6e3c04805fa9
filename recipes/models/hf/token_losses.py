"""Cross-entropy of targets from hidden states, without the logits of a whole micro-batch at once.

A real vocabulary makes logits the largest tensor of a step: those of 8,192 tokens take 8 GiB in fp32 with
Gemma's 262,144 entries, and as much again for log-probabilities and for gradients. So the output head runs on
some rows at a time, and again in the backward pass.

Letters: B samples, S sequence length, D width, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Logits that exist at once in any case: 64 MiB in fp32. They are kept for the backward pass.
LOGITS_AT_ONCE = 2**24


def target_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Returns the ``[B * S]`` cross-entropy of the targets, in fp32."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")


def rows_at_once(vocabulary: int, width: int) -> int:
    """Returns the number of tokens whose logits may exist at once.

    Each part makes a gradient of the whole head, of vocabulary x width elements. Its logits may be as many:
    with fewer, adding the gradients up would take longer than the products.
    """
    return max(width, LOGITS_AT_ONCE // vocabulary)


def losses_by_rows(
    losses_of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """Computes losses some rows at a time, and again in the backward pass.

    Args:
        losses_of: Takes some rows of the hidden states and of the targets; returns the losses.
        hidden: Hidden states; their first axis is split.
        targets: Targets, split likewise.
        rows: Rows at a time.

    Returns:
        The losses, concatenated along the first axis.
    """
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses_of(*part) for part in parts])
    return torch.cat([checkpoint(losses_of, *part, use_reentrant=False) for part in parts])
