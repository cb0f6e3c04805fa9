"""Dispatch where ranks hold the same tokens: each sends an equal share, and all receive all results.

Without it the experts would compute the same tokens once for each of these ranks.

Letters: T tokens, D model width, K slots a token, P ranks; N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.types import Routing


@dataclass(frozen=True)
class SharedDispatched(Dispatched):
    """Tokens of this rank's share that another dispatcher delivered.

    Attributes:
        inner: Result of the other dispatcher.
        num_tokens: T.
    """

    inner: Dispatched
    num_tokens: int


@dataclass(frozen=True)
class _ShareHandle(DispatchHandle):
    """A share on its way.

    Attributes:
        inner: Handle of the other dispatcher.
        num_tokens: T.
    """

    inner: DispatchHandle
    num_tokens: int

    def wait(self) -> Dispatched:
        """See `DispatchHandle.wait`."""
        inner = self.inner.wait()
        return SharedDispatched(inner.rows_ND, inner.weights_NK, inner.plan, inner, self.num_tokens)


class SameTokensDispatcher(Dispatcher):
    """Dispatcher that sends this rank's share of the tokens through another dispatcher.

    Every rank has the same tokens and the same routing. Results and the gradients of tokens and combine
    weights are complete on every rank; gradients of the experts cover the rank's share alone, and add up over
    ranks.
    """

    name = "same_tokens"

    def __init__(self, inner: Dispatcher, same: ProcessGroup | None = None) -> None:
        """Wraps a dispatcher.

        Args:
            inner: Dispatcher that sends the share.
            same: The ranks that hold the same tokens; None for this process alone.
        """
        self.inner = inner
        self.group = inner.group
        self._same = same

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Starts sending this rank's share."""
        mask_TK, mine = routing.slot_mask_TK, _share(len(x_TD), self._same)
        share = Routing(
            routing.expert_ids_TK[mine],
            _take(routing.weights_TK, self._same),
            routing.num_experts,
            None if mask_TK is None else mask_TK[mine],
        )
        return _ShareHandle(self.inner.start(_take(x_TD, self._same), share), len(x_TD))

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings the share back and joins the shares of all ranks."""
        assert isinstance(sent, SharedDispatched), type(sent)
        share_ND = self.inner.combine(y_ND, sent.inner)
        if self._same is None:
            return share_ND
        out_TD: Tensor = _Join.apply(share_ND, sent.num_tokens, self._same)  # type: ignore[no-untyped-call]
        return out_TD


def _share(tokens: int, same: ProcessGroup | None) -> slice:
    """Returns this rank's tokens: the next T / P, rounded up, as long as any are left."""
    if same is None:
        return slice(0, tokens)
    most = -(-tokens // same.size())
    return slice(min(tokens, same.rank() * most), min(tokens, (same.rank() + 1) * most))


def _take(x_TD: Tensor, same: ProcessGroup | None) -> Tensor:
    if same is None:
        return x_TD
    share_ND: Tensor = _Take.apply(x_TD, same)  # type: ignore[no-untyped-call]
    return share_ND


def _join(share_ND: Tensor, tokens: int, same: ProcessGroup) -> Tensor:
    """Gathers the shares of all ranks, in order."""
    most = -(-tokens // same.size())
    padded_ND = share_ND.new_zeros(most, share_ND.shape[1])
    padded_ND[: len(share_ND)] = share_ND
    all_MD = share_ND.new_empty(most * same.size(), share_ND.shape[1])
    dist.all_gather_single(all_MD, padded_ND, group=same)
    return all_MD[:tokens]


class _Take(torch.autograd.Function):
    """Autograd function that takes this rank's share of common rows; backward joins the gradients' shares."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, same: ProcessGroup) -> Tensor:
        ctx.tokens, ctx.same = len(x_TD), same
        return x_TD[_share(len(x_TD), same)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return _join(grad_ND, ctx.tokens, ctx.same), None


class _Join(torch.autograd.Function):
    """Autograd function that joins the shares of all ranks; backward takes this rank's share of gradients."""

    @staticmethod
    def forward(ctx: Any, share_ND: Tensor, tokens: int, same: ProcessGroup) -> Tensor:
        ctx.same = same
        return _join(share_ND, tokens, same)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TD[_share(len(grad_TD), ctx.same)].contiguous(), None, None
