"""Batches of several ranks to dispatch, and what experts make of them: on one rank, or spread over several.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kernels.activations import ACTIVATIONS
from moe.dispatch import Dispatcher
from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.same_tokens import SameTokensDispatcher
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import ExpertBank, FFNWeights
from moe.types import Routing

D, E, F = 6, 8, 5
#: How each dispatcher is made, for E experts over the ranks of a mesh of one axis (None: one process).
MAKERS: dict[str, Callable[[int, DeviceMesh | None], Dispatcher]] = {
    "local": lambda experts, mesh: LocalDispatcher(),
    "all_to_all": lambda experts, mesh: AllToAllDispatcher(
        experts, None if mesh is None else mesh.get_group()
    ),
    "same_tokens": lambda experts, mesh: SameTokensDispatcher(
        AllToAllDispatcher(experts), None if mesh is None else mesh.get_group()
    ),
}


@dataclass(frozen=True)
class Batch:
    """A rank's tokens and their routing.

    Attributes:
        x_TD: Tokens.
        ids_TK: Experts.
        weights_TK: Combine weights.
        mask_TK: Which slots are used; None for all.
        upstream_TD: Gradient of the output.
    """

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    mask_TK: Tensor | None
    upstream_TD: Tensor


@dataclass(frozen=True)
class DispatchCase:
    """Batches of any number of ranks.

    Attributes:
        tokens: Of rank r the entry r modulo their number.
        slots: Likewise; K may differ between ranks.
        used: Share of the slots in use; below 1 there is a mask, and nonsense in the unused slots.
        experts: Those that are routed to.
        dtype: Of the tokens.
    """

    tokens: tuple[int, ...] = (5, 9, 1, 7)
    slots: tuple[int, ...] = (3,)
    used: float = 1.0
    experts: tuple[int, ...] = tuple(range(E))
    dtype: torch.dtype = torch.float64

    def batch(self, rank: int) -> Batch:
        """Of one rank; it depends on the rank alone."""
        g = torch.Generator().manual_seed(17 * rank + 1)
        T, K = self.tokens[rank % len(self.tokens)], self.slots[rank % len(self.slots)]
        pool = torch.tensor(self.experts)
        ids_TK = pool[torch.rand(T, len(pool), generator=g).argsort(-1)[:, :K]]
        mask_TK = None
        if self.used < 1:
            mask_TK = torch.rand(T, K, generator=g) < self.used
            ids_TK = torch.where(mask_TK, ids_TK, torch.tensor([-7, 99])[torch.arange(K) % 2])
        x_TD, upstream_TD = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(2))
        weights_TK = torch.rand(T, K, generator=g, dtype=torch.float64)
        if self.dtype != torch.float64:
            weights_TK = weights_TK.float()
        return Batch(x_TD.to(self.dtype), ids_TK, weights_TK, mask_TK, upstream_TD.to(self.dtype))


CASES = {
    "plain": DispatchCase(),
    "one_slot": DispatchCase(slots=(1,)),
    "all_slots": DispatchCase(slots=(E,)),
    "unused_slots": DispatchCase(used=0.6),
    "nothing_used": DispatchCase(used=0.0),
    "slots_differ": DispatchCase(slots=(2, 5, 1, 3), used=0.8),
    "one_expert": DispatchCase(slots=(1,), experts=(0,)),
    "last_expert": DispatchCase(slots=(1,), experts=(E - 1,)),
    "few_experts": DispatchCase(experts=(1, 2, 5)),
    "no_tokens_first": DispatchCase(tokens=(0, 6)),
    "no_tokens_last": DispatchCase(tokens=(6, 0)),
    "no_tokens": DispatchCase(tokens=(0,)),
    "bf16": DispatchCase(dtype=torch.bfloat16),
}


def make_experts(gated: bool, dtype: torch.dtype) -> Experts:
    """E different experts, with biases when gated."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    U = 2 * F if gated else F
    bank = ExpertBank(normal(E, U, D), normal(E, D, F), "silu", gated)
    if gated:
        bank = ExpertBank(bank.w_up_EUD, bank.w_down_EDF, "silu", gated, normal(E, U), normal(E, D))
    return Experts(bank)


def make_shared() -> SharedExpert:
    """The same on every rank."""
    g = torch.Generator().manual_seed(5)
    up_FD, gate_FD, down_FD = (torch.randn(F, D, generator=g, dtype=torch.float64) for _ in range(3))
    return SharedExpert(FFNWeights(up_FD, down_FD.t().contiguous(), "silu", gate_FD))


def run(dispatcher: Dispatcher, experts: Experts, batch: Batch) -> dict[str, Tensor]:
    """Output, and the gradients of tokens, weights and experts, by name."""
    x_TD = batch.x_TD.clone().requires_grad_()
    weights_TK = batch.weights_TK.clone().requires_grad_()
    sent = dispatcher.dispatch(x_TD, Routing(batch.ids_TK, weights_TK, E, batch.mask_TK))
    out_TD = dispatcher.combine(experts(sent), sent)
    out_TD.backward(batch.upstream_TD)
    assert x_TD.grad is not None and weights_TK.grad is not None
    found = {"out": out_TD.detach(), "x": x_TD.grad, "weights": weights_TK.grad}
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: where it is sharded, others would wait"
        found[name] = local(parameter.grad)
    return found


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def obvious(experts: Experts, batch: Batch) -> dict[str, Tensor]:
    """The same, slot by slot and in fp64."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}
    x_TD = batch.x_TD.detach().double().requires_grad_()
    weights_TK = batch.weights_TK.detach().double().requires_grad_()
    rows = [torch.zeros(D, dtype=torch.float64) for _ in x_TD]
    act = ACTIVATIONS[experts.activation]
    for t, ids in enumerate(batch.ids_TK.tolist()):
        for k, e in enumerate(ids):
            if batch.mask_TK is None or batch.mask_TK[t, k]:
                up = leaves["w_up_EUD"][e] @ x_TD[t]
                up = up + leaves["b_up_EU"][e] if "b_up_EU" in leaves else up
                hidden = act.hidden(up[:F], up[F:]) if experts.gated else act.forward(up)
                y = leaves["w_down_EDF"][e] @ hidden
                y = y + leaves["b_down_ED"][e] if "b_down_ED" in leaves else y
                rows[t] = rows[t] + weights_TK[t, k] * y
    out_TD = torch.stack([*rows, torch.zeros(D, dtype=torch.float64)])[:-1]
    total = (out_TD * batch.upstream_TD.double()).sum() + 0 * sum(leaf.sum() for leaf in leaves.values())
    (total + 0 * (x_TD.sum() + weights_TK.sum())).backward()
    grads = {"x": x_TD.grad, "weights": weights_TK.grad} | {name: v.grad for name, v in leaves.items()}
    return {"out": out_TD.detach()} | {name: grad for name, grad in grads.items() if grad is not None}
