"""Forward pass of a batch, and its FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moe.accounting.layers import ModelShape
from moe.accounting.params import count_from_shape


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass.

    Attributes:
        lengths: Tokens of every sequence after the pass, earlier ones included.
        new_tokens: Tokens of each that the pass computes; None for one each, a decode step.

    Raises:
        ValueError: There is no sequence, or one has no new token or more new tokens than its length.
    """

    lengths: tuple[int, ...]
    new_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        new = self.new
        fits = len(new) == len(self.lengths) > 0
        if not fits or any(not 1 <= n <= length for n, length in zip(new, self.lengths, strict=True)):
            raise ValueError(
                f"lengths={self.lengths}, new_tokens={new} must hold one sequence or more, each of at least "
                "one new token and no more than it is long."
            )

    @property
    def new(self) -> tuple[int, ...]:
        """New tokens of every sequence."""
        return (1,) * len(self.lengths) if self.new_tokens is None else self.new_tokens

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(self.new)

    def positions(self) -> Iterator[int]:
        """Yields the position (from 1) of every new token."""
        for length, new in zip(self.lengths, self.new, strict=True):
            yield from range(length - new + 1, length + 1)


def decode_batch(sequences: int, length: int) -> Batch:
    """Returns a decode step of sequences of one length, the new token included."""
    return Batch((length,) * sequences)


def prefill_batch(sequences: int, length: int) -> Batch:
    """Returns a prefill of sequences of one length."""
    return Batch((length,) * sequences, (length,) * sequences)


def pass_flops(shape: ModelShape, batch: Batch, *, strict: bool = False) -> float:
    """Computes the FLOPs of a forward pass: tokens times S-F of MoE-CAP, for any choice of experts.

    The head counts for one token per sequence, as serving needs the logits of the last.

    Args:
        shape: Shape of the model; with `moe.accounting.flops.all_experts` the result is that of MFU.
        batch: Batch of the pass.
        strict: Applies equation 5 to the letter: attention, router and used experts (shared ones and dense
            networks included), without the head.

    Source: Y. Jiang et al., "MoE-CAP", arXiv:2412.07067, section 4.2. Attention counts the keys that each
        token sees, not those of the whole batch.
    """
    layers = count_from_shape(shape).matmul - shape.embedding
    if strict:
        layers -= sum(ffn.shared_gate for ffn in shape.moe) * shape.hidden_size
    flops = 2.0 * layers * batch.tokens
    for mixer, times in Counter(shape.attention).items():
        keys = sum(mixer.keys_at(position) for position in batch.positions())
        flops += times * (2 * mixer.score_width * keys + mixer.scan_flops * batch.tokens)
    return flops if strict else flops + 2 * shape.embedding * len(batch.lengths)
