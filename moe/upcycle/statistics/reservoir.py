"""Bounded sample of tokens that depends on the seed and the text alone, not on batches or ranks.

A token's priority is a hash of its number; the highest priorities are kept.

Letters: N tokens kept, T tokens of a batch, C columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.routing.draws import hashed_uniform, mix32
from moe.upcycle.statistics.base import LayerBatch, Statistic

_BITS32 = 0xFFFFFFFF


class ReservoirStatistic(Statistic):
    """Statistic that keeps one row for each of at most ``num_tokens`` tokens, in the order of the text."""

    #: Name of the option that bounds the sample.
    size_option = "num_tokens"

    def empty(self, columns: int, dtype: torch.dtype) -> None:
        """Empties the sample; `start` of a subclass calls it."""
        device = self.ffn.up_FD.device
        self.rows_NC = torch.zeros(0, columns, dtype=dtype, device=device)
        self.index_N = torch.zeros(0, dtype=torch.int64, device=device)

    @abstractmethod
    def update(self, batch: LayerBatch) -> None:
        """Makes a row for every token and calls `keep`."""

    def keep(self, rows_TC: Tensor, index_T: Tensor) -> None:
        """Offers the rows of a batch."""
        if len(self.index_N) == self.options[self.size_option]:
            # Most tokens of a long text lose against the kept ones: only the others are copied.
            wins_T = self._priority(index_T) >= self._priority(self.index_N).min()
            if not bool(wins_T.any()):
                return
            rows_TC, index_T = rows_TC[wins_T], index_T[wins_T]
        rows_NC = torch.cat([self.rows_NC, rows_TC.to(self.rows_NC.dtype)])
        index_N = torch.cat([self.index_N, index_T.to(self.index_N)])
        self._keep_best(rows_NC, index_N)

    def _keep_best(self, rows_NC: Tensor, index_N: Tensor) -> None:
        count = self.options[self.size_option]
        if len(index_N) > count:
            # The number itself breaks ties between hashes.
            ranked_N = index_N.argsort()
            order_N = self._priority(index_N[ranked_N]).argsort(descending=True, stable=True)[:count]
            kept_N = ranked_N[order_N]
            rows_NC, index_N = rows_NC[kept_N], index_N[kept_N]
        order_N = index_N.argsort()
        self.rows_NC, self.index_N = rows_NC[order_N], index_N[order_N]

    def _priority(self, index_N: Tensor) -> Tensor:
        keys = [int(hashed_uniform(self.draws.seed, "reservoir", part) * 2**32) for part in (0, 1)]
        high_N = mix32((index_N >> 32) ^ keys[1])
        return mix32(mix32((index_N & _BITS32) ^ keys[0]) ^ high_N)

    def state(self) -> dict[str, Tensor]:
        """Returns the rows and the numbers of their tokens."""
        return {"rows": self.rows_NC, "index": self.index_N}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Adopts rows and numbers."""
        self.rows_NC, self.index_N = state["rows"].to(self.rows_NC), state["index"].to(self.index_N)

    def merged(self, group: ProcessGroup | None) -> dict[str, Tensor]:
        """Returns the sample over all ranks. Collective."""
        if group is None:
            return self.state()
        own = self.state()
        count = torch.tensor([len(self.index_N)], device=self.index_N.device)
        counts = [torch.zeros_like(count) for _ in range(group.size())]
        torch.distributed.all_gather(counts, count, group=group)
        longest = max(int(c) for c in counts)
        rows, index = _gathered(self.rows_NC, longest, group), _gathered(self.index_N, longest, group)
        lengths = [int(c) for c in counts]
        self._keep_best(_cut(rows, lengths), _cut(index, lengths))
        merged = self.state()
        self.load(own)
        return merged

    def result(self) -> Tensor:
        """Returns ``[N, C]``."""
        return self.rows_NC.cpu()


def _gathered(value: Tensor, length: int, group: ProcessGroup) -> list[Tensor]:
    padded = value.new_zeros((length, *value.shape[1:]))
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in range(group.size())]
    torch.distributed.all_gather(parts, padded, group=group)
    return parts


def _cut(parts: list[Tensor], lengths: list[int]) -> Tensor:
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
