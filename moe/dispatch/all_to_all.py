"""Dispatch where every rank holds a slice of the experts: rows travel there and back by all-to-all.

A token is sent once to each rank that holds any of its experts, however many, and comes back as one weighted
sum: at most ``min(K, P)`` rows of a token are sent.

The way there does not block: computation between `AllToAllDispatcher.start` and the arrival overlaps with it.
In backward the rows' gradients are sent at the arrival's turn and awaited at the start's; the computation in
between overlaps again, since autograd runs in reverse order. The way back blocks.

Letters: T tokens, D model width, E experts, K slots a token, P ranks; N rows that this rank sends, M rows
that arrive at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from kernels.plan.row_plan import make_plan
from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.errors import ConfigError
from moe.types import Routing


def experts_of_a_rank(num_experts: int, ranks: int) -> int:
    """Returns the number of experts that each rank holds.

    Raises:
        ConfigError: The experts do not divide over the ranks.
    """
    if num_experts % ranks:
        rule = f"the ranks of a group hold equally many experts, and {num_experts} do not divide over {ranks}"
        remedy = f"Set a divisor of {num_experts}, or another number of experts."
        raise ConfigError.one("expert_parallel", ranks, rule, remedy)
    return num_experts // ranks


@dataclass(frozen=True)
class Splits:
    """Numbers of rows in one exchange, by rank of the group.

    Attributes:
        sent: Rows that go from here to each rank.
        received: Rows that come here from each rank.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> Splits:
        """The splits of the same rows on their way back."""
        return Splits(self.received, self.sent)


@dataclass(frozen=True)
class TravelledDispatched(Dispatched):
    """Rows that arrived from all ranks, with the tokens that this rank's own rows return to.

    Attributes:
        token_N: ``[N]`` int64 token of each row that was sent from here.
        num_tokens: T.
        splits: Splits of the exchange that brought the rows.
    """

    token_N: Tensor
    num_tokens: int
    splits: Splits


class AllToAllDispatcher(Dispatcher):
    """Dispatcher by all-to-all; rank r of P holds the experts ``r * E/P ... (r + 1) * E/P - 1``.

    Every rank of the group must call it equally often, with any number of tokens, zero included. The host
    waits for the device once, to learn the split sizes and the number of used slots that arrive. With one
    rank nothing is sent.
    """

    name = "all_to_all"

    def __init__(self, num_experts: int, group: ProcessGroup | None = None) -> None:
        """Joins a group.

        Args:
            num_experts: E, over all ranks together.
            group: The ranks that together hold all experts once; None for this process alone.

        Raises:
            ConfigError: The experts do not divide over the ranks.
        """
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.num_experts = num_experts
        self.num_local = experts_of_a_rank(num_experts, self.ranks)

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Starts sending each token, with its weights, to the ranks of its experts."""
        assert routing.num_experts == self.num_experts, (routing.num_experts, self.num_experts)
        rank_TK = self._rank_of_slots(routing)
        wanted_TP = torch.zeros(len(x_TD), self.ranks + 1, dtype=torch.bool, device=x_TD.device)
        wanted_PT = wanted_TP.scatter_(1, rank_TK, True)[:, : self.ranks].t()
        used_P = torch.zeros(self.ranks + 1, dtype=torch.int64, device=x_TD.device)
        used_P = used_P.scatter_add_(0, rank_TK.reshape(-1), torch.ones_like(rank_TK).reshape(-1))[:-1]
        splits, most_slots, arriving = self._exchange_counts(wanted_PT.sum(1), used_P, rank_TK.shape[1])
        found_N2 = torch.nonzero_static(wanted_PT.contiguous(), size=sum(splits.sent))
        to_N, token_N = found_N2[:, 0], found_N2[:, 1]
        elsewhere_NK = rank_TK.index_select(0, token_N) != to_N[:, None]
        # A slot whose expert is on another rank gets an id past the last.
        ids_NK = routing.expert_ids_TK.index_select(0, token_N) - to_N[:, None] * self.num_local
        ids_NK = ids_NK.masked_fill(elsewhere_NK, self.num_local).int()
        weights_NK = routing.weights_TK.index_select(0, token_N).masked_fill(elsewhere_NK, 0.0)
        # Where the number of experts varies, one rank may use more slots than another.
        spare = (0, most_slots - rank_TK.shape[1])
        ids = self._send(F.pad(ids_NK, spare, value=self.num_local), splits)
        rows = self._send(x_TD.index_select(0, token_N), splits)
        weights = self._send(F.pad(weights_NK, spare), splits)
        return _Travelling(ids, rows, weights, token_N, len(x_TD), splits, self.num_local, arriving)

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings the sums back and adds up each token's sums of all ranks, in at least fp32."""
        assert isinstance(sent, TravelledDispatched), type(sent)
        home_ND = self._send(y_ND, sent.splits.back).wait()
        dtype = torch.promote_types(y_ND.dtype, torch.float32)
        out_TD = torch.zeros(sent.num_tokens, y_ND.shape[1], dtype=dtype, device=y_ND.device)
        return out_TD.index_add(0, sent.token_N, home_ND.to(dtype)).to(y_ND.dtype)

    def _rank_of_slots(self, routing: Routing) -> Tensor:
        """Returns the ``[T, K]`` rank of each slot's expert; P where the slot is unused."""
        rank_TK = torch.div(routing.expert_ids_TK, self.num_local, rounding_mode="floor")
        if routing.slot_mask_TK is None:
            return rank_TK
        return rank_TK.masked_fill(~routing.slot_mask_TK, self.ranks)

    def _exchange_counts(self, sent_P: Tensor, used_P: Tensor, slots: int) -> tuple[Splits, int, int]:
        """Returns the splits, the largest K of all ranks, and the number of used slots that arrive."""
        sent_P3 = torch.stack([sent_P, used_P, torch.full_like(sent_P, slots)], 1)
        received_P3 = sent_P3
        if self.ranks > 1:
            received_P3 = torch.empty_like(sent_P3)
            dist.all_to_all_single(received_P3.view(-1), sent_P3.view(-1), group=self.group)
        sent, received, used, widths = torch.stack([sent_P, *received_P3.unbind(1)]).tolist()
        return Splits(tuple(sent), tuple(received)), max(widths), sum(used)

    def _send(self, rows_ND: Tensor, splits: Splits) -> _Shipment:
        """Starts sending rows; the shipment waits for the rows that arrive here."""
        if self.ranks == 1:
            return _Shipment(rows_ND, None)
        trip = _Trip(splits, self.group)
        moving_MD: Tensor = _Depart.apply(rows_ND, trip)  # type: ignore[no-untyped-call]
        return _Shipment(moving_MD, trip)


@dataclass(frozen=True)
class _Shipment:
    """Rows under way.

    Attributes:
        moving_MD: The rows that arrive here, not yet filled.
        trip: The exchange; None if nothing is sent.
    """

    moving_MD: Tensor
    trip: _Trip | None

    def wait(self) -> Tensor:
        """Waits for the rows."""
        if self.trip is None:
            return self.moving_MD
        arrived_MD: Tensor = _Arrive.apply(self.moving_MD, self.trip)  # type: ignore[no-untyped-call]
        return arrived_MD


@dataclass(frozen=True)
class _Travelling(DispatchHandle):
    """Ids, rows and weights on their way.

    Attributes:
        token_N: See `TravelledDispatched`.
        num_tokens: T.
        splits: Splits of the exchange.
        num_local: Experts that this rank holds.
        arriving: Used slots that arrive here.
    """

    ids: _Shipment
    rows: _Shipment
    weights: _Shipment
    token_N: Tensor
    num_tokens: int
    splits: Splits
    num_local: int
    arriving: int

    def wait(self) -> Dispatched:
        """See `DispatchHandle.wait`."""
        ids_MK = self.ids.wait().long()
        return TravelledDispatched(
            rows_ND=self.rows.wait(),
            weights_NK=self.weights.wait(),
            plan=make_plan(ids_MK, self.num_local, ids_MK < self.num_local, self.arriving),
            token_N=self.token_N,
            num_tokens=self.num_tokens,
            splits=self.splits,
        )


class _Trip:
    """Exchange of rows, and later of their gradients in the opposite direction."""

    def __init__(self, splits: Splits, group: ProcessGroup | None) -> None:
        self._splits, self._group = splits, group
        # The exchange, its input and its output: all must live until it is over.
        self._moving: tuple[Any, Tensor, Tensor] | None = None

    def begin(self, rows_ND: Tensor, *, back: bool = False) -> Tensor:
        """Starts sending rows; the returned tensor is filled once `end` returns."""
        assert self._moving is None, "an exchange of this trip is already under way"
        splits = self._splits.back if back else self._splits
        rows_ND = rows_ND.contiguous()
        out_MD = rows_ND.new_empty(sum(splits.received), *rows_ND.shape[1:])
        sizes = list(splits.received), list(splits.sent)
        work = dist.all_to_all_single(out_MD, rows_ND, *sizes, group=self._group, async_op=True)
        self._moving = work, rows_ND, out_MD
        return out_MD

    def end(self) -> Tensor:
        """Waits for the rows that arrive here."""
        assert self._moving is not None, "nothing is under way"
        work, _, out_MD = self._moving
        work.wait()
        self._moving = None
        return out_MD


class _Depart(torch.autograd.Function):
    """Autograd function that sends rows; backward waits for the gradients that `_Arrive` sends back."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.begin(rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    """Autograd function that waits for rows; backward starts sending their gradients back."""

    @staticmethod
    def forward(ctx: Any, moving_MD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.end()
        return moving_MD.view_as(moving_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.begin(grad_MD, back=True)
        # Never read: the gradients bypass autograd, which only checks the shape.
        return grad_MD.new_zeros(()).expand(grad_MD.shape), None
