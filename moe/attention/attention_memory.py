"""Keys and values that attention experts remember: each expert those of its own tokens.

Letters: B sequences, S positions of a pass, E experts, H head width, R rows of an expert (a token each), N
largest number of new rows of a sequence, M largest number of remembered rows of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """Tokens of one pass that went to one expert, by sequence and then by position.

    Attributes:
        token_R: int64 index among all tokens of the pass.
        sequence_R: int64 sequence of the token.
        position_R: int64 position of the token in the pass, from 0.
        slot_R: int64 number of earlier rows of the same sequence.
        count_B: int64 rows of each sequence.
        longest: N, the largest of these counts.
    """

    token_R: Tensor
    sequence_R: Tensor
    position_R: Tensor
    slot_R: Tensor
    count_B: Tensor
    longest: int

    def padded(self, values: Tensor) -> Tensor:
        """Converts ``[R, ...]`` to ``[B, N, ...]``, 0 where a sequence has fewer rows."""
        out = values.new_zeros((len(self.count_B), self.longest, *values.shape[1:]))
        return out.index_put((self.sequence_R, self.slot_R), values)

    def unpadded(self, values: Tensor) -> Tensor:
        """Converts ``[B, N, ...]`` to ``[R, ...]``."""
        return values[self.sequence_R, self.slot_R]


def rows_by_expert(chosen_BSE: Tensor) -> list[ExpertRows]:
    """Returns the rows of every expert. The host waits for the device three times, for any E.

    Args:
        chosen_BSE: bool, True where a token uses an expert.
    """
    S = chosen_BSE.shape[1]
    counts_EB = chosen_BSE.sum(1).t().contiguous()
    slot_BSE = chosen_BSE.cumsum(1) - 1
    # Sorted by expert, then by sequence, then by position.
    expert_sequence_position = chosen_BSE.permute(2, 0, 1).nonzero()
    by_expert = torch.split(expert_sequence_position, counts_EB.sum(1).tolist())
    longest = counts_EB.amax(1).tolist()
    rows = []
    for e, found_R3 in enumerate(by_expert):
        _, sequence_R, position_R = found_R3.unbind(1)
        slot_R = slot_BSE[sequence_R, position_R, e]
        token_R = sequence_R * S + position_R
        rows.append(ExpertRows(token_R, sequence_R, position_R, slot_R, counts_EB[e], longest[e]))
    return rows


@dataclass(frozen=True)
class Remembered:
    """Keys and values of one expert: a sequence's rows first, then padding.

    Attributes:
        keys_BMH: Keys, normalised and rotated.
        values_BMH: Values.
        position_BM: int64 position in the sequence, over all passes; undefined in padding.
        count_B: int64 rows of each sequence.
    """

    keys_BMH: Tensor
    values_BMH: Tensor
    position_BM: Tensor
    count_B: Tensor

    @property
    def real_BM(self) -> Tensor:
        """Mask ``[B, M]``, bool, False in padding."""
        return torch.arange(self.position_BM.shape[1], device=self.count_B.device) < self.count_B[:, None]

    def with_rows(self, rows: ExpertRows, keys_RH: Tensor, values_RH: Tensor, past: int) -> Remembered:
        """Returns the memory with the rows of a pass appended.

        Args:
            rows: Tokens of the rows.
            keys_RH: Their keys.
            values_RH: Their values.
            past: Tokens of a sequence before this pass.
        """
        count_B = self.count_B + rows.count_B
        missing = int(count_B.max()) - self.position_BM.shape[1]
        at = (rows.sequence_R, self.count_B[rows.sequence_R] + rows.slot_R)

        def joined(before: Tensor, new: Tensor) -> Tensor:
            room = before.new_zeros((len(before), max(missing, 0), *before.shape[2:]))
            return torch.cat([before, room], 1).index_put(at, new)

        return Remembered(
            joined(self.keys_BMH, keys_RH),
            joined(self.values_BMH, values_RH),
            joined(self.position_BM, rows.position_R + past),
            count_B,
        )

    def only(self, kept_BM: Tensor) -> Remembered:
        """Returns the kept rows, in order; the memory shrinks to the longest sequence."""
        kept_BM = kept_BM & self.real_BM
        count_B = kept_BM.sum(1)
        order_BM = (~kept_BM).long().argsort(dim=1, stable=True)[:, : int(count_B.max())]
        at_B1 = torch.arange(len(count_B), device=count_B.device)[:, None]
        return replace(self.changed(lambda tensor: tensor[at_B1, order_BM]), count_B=count_B)

    def of_sequences(self, index_B: Tensor) -> Remembered:
        """Returns the memory of other sequences, by number; a sequence may repeat."""
        taken = self.changed(lambda tensor: tensor[index_B.to(tensor.device)])
        return replace(taken, count_B=self.count_B[index_B.to(self.count_B.device)])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Remembered:
        """Applies the same change to keys, values and positions."""
        keys_BMH, values_BMH = change(self.keys_BMH), change(self.values_BMH)
        return Remembered(keys_BMH, values_BMH, change(self.position_BM), self.count_B)


class KeyMemory:
    """Keys and values that one layer's experts remember during generation.

    Attributes:
        num_tokens: Positions of a sequence so far, whichever experts they went to.
        window: Positions that a query sees, itself included; older rows are dropped. None for all.
        experts: Memory by the expert's number; an expert without tokens has none.
    """

    def __init__(self, window: int | None = None) -> None:
        self.num_tokens = 0
        self.window = window
        self.experts: dict[int, Remembered] = {}

    @property
    def num_rows(self) -> int:
        """Keys in memory, over sequences and experts, padding included."""
        return sum(found.position_BM.numel() for found in self.experts.values())

    def extend(self, expert: int, rows: ExpertRows, keys_RH: Tensor, values_RH: Tensor) -> Remembered:
        """Appends the rows of a pass to an expert's memory, and returns it."""
        before = self.experts.get(expert)
        if before is None:
            before = nothing(len(rows.count_B), keys_RH, values_RH)
        self.experts[expert] = before.with_rows(rows, keys_RH, values_RH, self.num_tokens)
        return self.experts[expert]

    def advance(self, num_positions: int) -> None:
        """Ends a pass over a number of positions and drops rows that no later query sees."""
        self.num_tokens += num_positions
        if self.window is not None and self.num_tokens >= self.window:
            oldest = self.num_tokens - self.window + 1
            self._keep(lambda found: found.position_BM >= oldest)

    def crop(self, num_tokens: int) -> None:
        """Truncates the memory to the first positions."""
        assert num_tokens <= self.num_tokens, (num_tokens, self.num_tokens)
        self._keep(lambda found: found.position_BM < num_tokens)
        self.num_tokens = num_tokens

    def take(self, index_B: Tensor) -> None:
        """Continues with other sequences, by number."""
        self.experts = {e: found.of_sequences(index_B) for e, found in self.experts.items()}

    def _keep(self, chosen: Callable[[Remembered], Tensor]) -> None:
        self.experts = {e: found.only(chosen(found)) for e, found in self.experts.items()}


def nothing(num_sequences: int, keys_RH: Tensor, values_RH: Tensor) -> Remembered:
    """Returns the empty memory of an expert.

    Args:
        num_sequences: B.
        keys_RH: Any keys, for width, dtype and device.
        values_RH: Any values, likewise.
    """
    ids = torch.zeros(num_sequences, dtype=torch.int64, device=keys_RH.device)
    return Remembered(
        keys_RH.new_zeros(num_sequences, 0, keys_RH.shape[1]),
        values_RH.new_zeros(num_sequences, 0, values_RH.shape[1]),
        ids[:, None][:, :0],
        ids,
    )
