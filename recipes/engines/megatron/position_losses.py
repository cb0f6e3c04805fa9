"""Losses of a Megatron GPT model, whose output head sees some positions at a time.

Letters: B samples, S sequence length, P positions of one tensor-parallel rank, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from recipes.models.hf.token_losses import losses_by_rows, rows_at_once


@contextmanager
def losses_by_position(gpt: Any, sequence_ranks: int) -> Iterator[None]:
    """While open, the last stage of a GPT model computes losses without the logits of all positions at once.

    Its vocabulary may be divided over tensor-parallel ranks, each of which takes the same positions.

    Args:
        gpt: This rank's stage.
        sequence_ranks: Ranks that the positions are divided over on their way to the head; 1 for all on each.
    """
    if not gpt.post_process:
        yield
        return
    head = gpt.output_layer
    gpt._modules["output_layer"] = _Passing(head)
    gpt.compute_language_model_loss = partial(_losses, gpt, head, sequence_ranks)
    try:
        yield
    finally:
        gpt._modules["output_layer"] = head
        del gpt.compute_language_model_loss


def _losses(
    gpt: Any, head: Any, sequence_ranks: int, targets_BS: Tensor, given: tuple[Tensor, dict[str, Any]]
) -> Tensor:
    hidden_PBD, options = given
    whole = partial(type(gpt).compute_language_model_loss, gpt)

    def losses_of(hidden: Tensor, targets: Tensor) -> Tensor:
        logits, _ = head(hidden, **options)
        # The head gathers the positions of all ranks, in the order of the ranks.
        targets_BS = targets.permute(2, 1, 0).flatten(1)
        return whole(targets_BS, logits).T.reshape(sequence_ranks, -1, targets_BS.shape[0]).transpose(0, 1)

    samples = hidden_PBD.shape[1]
    targets_PRB = targets_BS.T.reshape(sequence_ranks, -1, samples).transpose(0, 1)
    rows = max(1, rows_at_once(gpt.vocab_size, hidden_PBD.shape[-1]) // (samples * sequence_ranks))
    if hidden_PBD.shape[0] <= rows:
        losses_PRB = losses_of(hidden_PBD, targets_PRB)
    else:
        losses_PRB = losses_by_rows(losses_of, hidden_PBD, targets_PRB, rows)
    return losses_PRB.transpose(0, 1).flatten(0, 1).T.contiguous()


class _Passing:
    """Stands for a head: hands on what it was given, to where its logits would have gone."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(self, hidden_PBD: Tensor, **options: Any) -> tuple[tuple[Tensor, dict[str, Any]], None]:
        return (hidden_PBD, options), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)
