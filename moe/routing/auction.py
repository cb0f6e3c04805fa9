"""Balanced assignment of tokens to experts by auction: every expert gets the same number of tokens.

Source: Lewis et al. 2021 (BASE layers, arXiv 2103.16716), whose experts bid for tokens in Bertsekas's auction
(1992); the price step, the value of what is held and the 100 rounds are those of its release in fairseq.

Letters: T tokens, E experts, N tokens that an expert considers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# As in the release: range of affinities over the price step, and the smallest price step.
_STEPS_IN_RANGE = 50
_SMALLEST_STEP = 1e-4


@dataclass(frozen=True)
class Assignment:
    """Result of an auction.

    Attributes:
        expert_T: ``[T]`` int64 expert of each token.
        rounds: Rounds of bidding.
    """

    expert_T: Tensor
    rounds: int


def fair_capacities(affinity_TE: Tensor) -> Tensor:
    """Returns the ``[E]`` int64 tokens of each expert: T/E, rounded down or up if E does not divide T.

    The experts in highest demand (by the sum of the softmax of affinities) get the larger number.
    """
    T, E = affinity_TE.shape
    capacity_E = torch.full((E,), T // E, dtype=torch.int64, device=affinity_TE.device)
    wanted_E = affinity_TE.softmax(-1).sum(0)
    capacity_E[wanted_E.topk(T % E).indices] += 1
    return capacity_E


@torch.no_grad()
def balanced_assignment(
    affinity_TE: Tensor, capacity_E: Tensor | None = None, max_rounds: int = 100
) -> Assignment:
    """Assigns every expert exactly its number of tokens, with a large sum of affinities.

    In a round every expert bids for as many tokens as it has room for: those it holds, and those with the
    highest affinity minus price. It bids the token's surplus over the best one left out, plus a step, and the
    step alone for a token it holds; the highest bidder holds the token, and the bid raises its price. Once
    every token is held, every expert is full. Tokens without an owner after `max_rounds` go to the expert of
    highest affinity with room, best first (the release continues bidding with other values).

    The host reads from the device once a round.

    Args:
        affinity_TE: ``[T, E]`` scores; non-finite ones count as the smallest finite one.
        capacity_E: ``[E]`` int64 tokens of each expert, with sum T; `fair_capacities` by default.
        max_rounds: Upper bound on rounds of bidding.
    """
    T, E = affinity_TE.shape
    if T == 0:
        return Assignment(affinity_TE.new_zeros(0, dtype=torch.int64), 0)
    affinity_TE = _finite(affinity_TE)
    capacity_E = fair_capacities(affinity_TE) if capacity_E is None else capacity_E
    assert int(capacity_E.sum()) == T, (capacity_E, T)
    # Shifted to start at zero, so that prices are not lost in the rounding of large affinities.
    affinity_ET = (affinity_TE - affinity_TE.min()).t().contiguous()
    step = (affinity_ET.max() / _STEPS_IN_RANGE).clamp_min(_SMALLEST_STEP)
    price_T = affinity_ET.new_zeros(T)
    owner_T = torch.full((T,), -1, dtype=torch.int64, device=affinity_ET.device)
    experts_E1 = torch.arange(E, device=affinity_ET.device)[:, None]
    looked_at = min(int(capacity_E.max()) + 1, T)
    for number in range(1, max_rounds + 1):
        held_ET = owner_T == experts_E1
        bid_ET = _bids(affinity_ET, price_T, held_ET, capacity_E, looked_at, step)
        highest_T, bidder_T = bid_ET.max(0)
        owner_T = torch.where(highest_T > 0, bidder_T, -1)
        if bool((owner_T >= 0).all()):
            return Assignment(owner_T, number)
        price_T = price_T + highest_T
    return Assignment(_place_the_rest(affinity_ET.t(), owner_T, capacity_E), max_rounds)


def _finite(affinity_TE: Tensor) -> Tensor:
    finite_TE = affinity_TE.isfinite()
    smallest = torch.where(finite_TE, affinity_TE, torch.inf).amin()
    return torch.where(finite_TE, affinity_TE, torch.where(smallest.isfinite(), smallest, 0))


def _bids(
    affinity_ET: Tensor, price_T: Tensor, held_ET: Tensor, capacity_E: Tensor, looked_at: int, step: Tensor
) -> Tensor:
    """Returns ``[E, T]`` bids, zero for none; each expert makes exactly as many as it has room for."""
    value_ET = affinity_ET - price_T
    # Tokens that an expert holds come first whatever their price, and count as the highest affinity.
    order_EN = value_ET.masked_fill(held_ET, torch.inf).topk(looked_at, dim=1).indices
    value_EN = torch.where(held_ET, affinity_ET.max(), value_ET).gather(1, order_EN)
    left_out_E1 = value_EN.gather(1, capacity_E.clamp_max(looked_at - 1)[:, None])
    bid_EN = (value_EN - left_out_E1).clamp_min(0) + step
    # A token that is held costs a step only: at its bidder's full surplus nobody could win it back.
    bid_EN = torch.where(held_ET.gather(1, order_EN), step, bid_EN)
    wanted_EN = torch.arange(looked_at, device=affinity_ET.device) < capacity_E[:, None]
    return torch.zeros_like(affinity_ET).scatter_(1, order_EN, bid_EN * wanted_EN)


def _place_the_rest(affinity_TE: Tensor, owner_T: Tensor, capacity_E: Tensor) -> Tensor:
    """Assigns tokens without an owner to experts with room, those of highest affinity first."""
    E = affinity_TE.shape[1]
    owner_T = owner_T.clone()
    while bool((owner_T < 0).any()):
        left_N = (owner_T < 0).nonzero().squeeze(1)
        room_E = capacity_E - torch.bincount(owner_T[owner_T >= 0], minlength=E)
        best_N, expert_N = affinity_TE[left_N].masked_fill(room_E <= 0, -torch.inf).max(1)
        # Sorted by expert, and within an expert by falling affinity.
        order_N = best_N.argsort(descending=True, stable=True)
        order_N = order_N[expert_N[order_N].argsort(stable=True)]
        expert_N = expert_N[order_N]
        first_E = torch.bincount(expert_N, minlength=E).cumsum(0) - torch.bincount(expert_N, minlength=E)
        place_N = torch.arange(len(order_N), device=owner_T.device) - first_E[expert_N]
        taken_N = place_N < room_E[expert_N]
        owner_T[left_N[order_N[taken_N]]] = expert_N[taken_N]
    return owner_T
