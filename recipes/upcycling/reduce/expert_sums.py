"""Runs text through a mixture and sums up what each expert does with its tokens.

Letters: B samples, S sequence length, T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.activations import ACTIVATIONS
from moe.experts.experts import Experts
from moe.layer import MoELayer
from moe.types import Routing
from recipes.models.hf.hf_model import HFModel


@dataclass
class ExpertSums:
    """Sums over the tokens of a text, for the experts of one layer.

    Attributes:
        counts_E: ``[E]`` fp64 tokens that are routed to each.
        norms_E: ``[E]`` fp64 sums of the L2 norms of their outputs.
        weighted_E: ``[E]`` fp64 sums of these norms times the combine weights.
        weights_E: ``[E]`` fp64 sums of the combine weights.
        logits_EE: ``[E, E]`` fp64 sums of products of two experts' router logits; zeros where a router has
            none.
        tokens: Number of tokens.
    """

    counts_E: Tensor
    norms_E: Tensor
    weighted_E: Tensor
    weights_E: Tensor
    logits_EE: Tensor
    tokens: int = 0


@torch.no_grad()
def gather_sums(model: HFModel, batches: Iterator[Tensor]) -> dict[int, ExpertSums]:
    """Sums over text, by block.

    Args:
        model: The mixture in evaluation mode, all of its weights in memory.
        batches: ``[B, S]`` ids.
    """
    layers = dict(model.moe_layers())
    sums = {index: zero_sums(layer.experts.shape[0]) for index, layer in layers.items()}
    looks = ((layer, partial(add_tokens, sums[index], layer.experts)) for index, layer in layers.items())
    with watching(looks):
        for tokens_BS in batches:
            model.module.base_model(input_ids=tokens_BS, use_cache=False)
    return sums


def expert_output(experts: Experts, expert: int, x_TD: Tensor) -> Tensor:
    """Computes what one expert makes of tokens, ``[T, D]``, without its weight."""
    up, down = experts.w_up_EUD[expert], experts.w_down_EDF[expert]
    b_up = None if experts.b_up_EU is None else experts.b_up_EU[expert]
    b_down = None if experts.b_down_ED is None else experts.b_down_ED[expert]
    hidden, act = functional.linear(x_TD, up, b_up), ACTIVATIONS[experts.activation]
    hidden = act.hidden(*hidden.chunk(2, dim=-1)) if experts.gated else act.forward(hidden)
    return functional.linear(hidden, down, b_down)


def zero_sums(experts: int) -> ExpertSums:
    """Returns the sums over no tokens."""
    rows = (torch.zeros(experts, dtype=torch.float64) for _ in range(4))
    return ExpertSums(*rows, torch.zeros(experts, experts, dtype=torch.float64))


@contextmanager
def watching(looks: Iterable[tuple[MoELayer, Callable[[Tensor, Routing], None]]]) -> Iterator[None]:
    """Shows inputs ``[T, D]`` of layers, and the choice of their routers for them, while open.

    Args:
        looks: Layer, and what is called in each forward pass.
    """

    def hook(look: Callable[[Tensor, Routing], None]) -> Callable[..., None]:
        return lambda router, args, out: look(args[0], out)

    handles = [layer.router.register_forward_hook(hook(look)) for layer, look in looks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_tokens(sums: ExpertSums, experts: Experts, x_TD: Tensor, out: Routing) -> None:
    """Adds what the chosen experts make of tokens to the sums of their layer.

    Args:
        sums: The sums.
        experts: The layer's experts.
        x_TD: Inputs of the layer.
        out: Choice of its router for them.
    """
    used_TK = out.slot_mask_TK
    sums.tokens += len(x_TD)
    if out.logits_TE is not None:
        sums.logits_EE += out.logits_TE.double().T @ out.logits_TE.double()
    for expert in range(out.num_experts):
        chosen_TK = out.expert_ids_TK == expert
        if used_TK is not None:
            chosen_TK = chosen_TK & used_TK
        rows = chosen_TK.any(-1).nonzero().flatten()
        if not len(rows):
            continue
        norms_N = expert_output(experts, expert, x_TD[rows]).double().norm(dim=-1)
        weights_N = (out.weights_TK * chosen_TK).sum(-1)[rows].double()
        sums.counts_E[expert] += len(rows)
        sums.norms_E[expert] += norms_N.sum()
        sums.weights_E[expert] += weights_N.sum()
        sums.weighted_E[expert] += (weights_N * norms_N).sum()
