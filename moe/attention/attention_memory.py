"""The keys and values that attention experts remember: of each expert, those of the tokens it was given.

Letters: B sequences, S positions of a pass, E experts, H head width, R rows of an expert (a token each), N
most new rows of a sequence, M most remembered rows of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """The tokens of one pass that one expert was given, by sequence and then by position.

    Attributes:
        token_R: int64 index among all tokens of the pass.
        sequence_R: int64 its sequence.
        position_R: int64 its position in the pass, from 0.
        slot_R: int64 how many rows of the same sequence stand before it.
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
        """``[R, ...]`` to ``[B, N, ...]``, 0 where a sequence has fewer rows."""
        out = values.new_zeros((len(self.count_B), self.longest, *values.shape[1:]))
        return out.index_put((self.sequence_R, self.slot_R), values)

    def unpadded(self, values: Tensor) -> Tensor:
        """``[B, N, ...]`` to ``[R, ...]``."""
        return values[self.sequence_R, self.slot_R]


def rows_by_expert(chosen_BSE: Tensor) -> list[ExpertRows]:
    """What every expert is given. The host waits for the device three times, whatever E is.

    Args:
        chosen_BSE: bool, which experts each token uses.
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
    """The keys and values of one expert, a sequence's first rows, then padding.

    Attributes:
        keys_BMH: Keys, as they are compared with queries.
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
        """bool, False in padding."""
        return torch.arange(self.position_BM.shape[1], device=self.count_B.device) < self.count_B[:, None]

    def with_rows(self, rows: ExpertRows, keys_RH: Tensor, values_RH: Tensor, past: int) -> Remembered:
        """The same with the rows of a pass behind.

        Args:
            rows: Which tokens they are of.
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
        """Without the rows that are not kept, in order; memory shrinks to the longest sequence."""
        kept_BM = kept_BM & self.real_BM
        count_B = kept_BM.sum(1)
        order_BM = (~kept_BM).long().argsort(dim=1, stable=True)[:, : int(count_B.max())]
        at_B1 = torch.arange(len(count_B), device=count_B.device)[:, None]
        return replace(self.changed(lambda tensor: tensor[at_B1, order_BM]), count_B=count_B)

    def of_sequences(self, index_B: Tensor) -> Remembered:
        """Of other sequences, by their number; a sequence may be taken more than once."""
        taken = self.changed(lambda tensor: tensor[index_B.to(tensor.device)])
        return replace(taken, count_B=self.count_B[index_B.to(self.count_B.device)])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Remembered:
        """With keys, values and positions changed alike."""
        keys_BMH, values_BMH = change(self.keys_BMH), change(self.values_BMH)
        return Remembered(keys_BMH, values_BMH, change(self.position_BM), self.count_B)


class KeyMemory:
    """What the experts of one layer remember of the tokens before, while text is generated.

    Attributes:
        num_tokens: Positions of a sequence that it has seen, whichever experts they went to.
        window: Positions that a query sees, itself included: older rows are forgotten. None for all.
        experts: By the expert's number; an expert that nothing was sent to has none.
    """

    def __init__(self, window: int | None = None) -> None:
        self.num_tokens = 0
        self.window = window
        self.experts: dict[int, Remembered] = {}

    @property
    def num_rows(self) -> int:
        """Keys that take memory, over sequences and experts, padding included."""
        return sum(found.position_BM.numel() for found in self.experts.values())

    def extend(self, expert: int, rows: ExpertRows, keys_RH: Tensor, values_RH: Tensor) -> Remembered:
        """Adds the rows of a pass to an expert's and returns all that it remembers."""
        before = self.experts.get(expert)
        if before is None:
            before = nothing(len(rows.count_B), keys_RH, values_RH)
        self.experts[expert] = before.with_rows(rows, keys_RH, values_RH, self.num_tokens)
        return self.experts[expert]

    def advance(self, num_positions: int) -> None:
        """Ends a pass over so many positions and forgets what no later query sees."""
        self.num_tokens += num_positions
        if self.window is not None and self.num_tokens >= self.window:
            oldest = self.num_tokens - self.window + 1
            self._keep(lambda found: found.position_BM >= oldest)

    def crop(self, num_tokens: int) -> None:
        """Goes back to so many positions."""
        assert num_tokens <= self.num_tokens, (num_tokens, self.num_tokens)
        self._keep(lambda found: found.position_BM < num_tokens)
        self.num_tokens = num_tokens

    def take(self, index_B: Tensor) -> None:
        """Goes on with other sequences, by their number."""
        self.experts = {e: found.of_sequences(index_B) for e, found in self.experts.items()}

    def _keep(self, chosen: Callable[[Remembered], Tensor]) -> None:
        self.experts = {e: found.only(chosen(found)) for e, found in self.experts.items()}


def nothing(num_sequences: int, keys_RH: Tensor, values_RH: Tensor) -> Remembered:
    """What an expert remembers at the beginning.

    Args:
        num_sequences: B.
        keys_RH: Of some token, for width, dtype and device.
        values_RH: The same.
    """
    ids = torch.zeros(num_sequences, dtype=torch.int64, device=keys_RH.device)
    return Remembered(
        keys_RH.new_zeros(num_sequences, 0, keys_RH.shape[1]),
        values_RH.new_zeros(num_sequences, 0, values_RH.shape[1]),
        ids[:, None][:, :0],
        ids,
    )
