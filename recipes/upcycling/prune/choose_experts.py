"""Chooses the experts of each layer that are kept."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.routing.draws import seeded_generator
from recipes.models.export.spec import MoESpec
from recipes.upcycling.prune.criteria.base import Criterion
from recipes.upcycling.reduce.expert_sums import ExpertSums


def choose_experts(
    blocks: tuple[MoESpec, ...], sums: Mapping[int, ExpertSums], criterion: Criterion, keep: int, seed: int
) -> dict[int, list[int]]:
    """Returns the experts of the highest scores, by block and ascending.

    Of a router that chooses among groups, every group keeps the same number.

    Args:
        blocks: The MoE layers.
        sums: What their experts did, by block.
        criterion: Criterion of the scores.
        keep: Experts that each layer keeps.
        seed: Seed of criteria that draw.
    """
    found = {}
    for moe in blocks:
        scores_E = criterion.scores_E(sums[moe.index], seeded_generator(seed, "prune", moe.index))
        groups = getattr(moe.router.config, "num_groups", 1)
        found[moe.index] = sorted(_best(scores_E, groups, keep // groups))
    return found


def _best(scores_E: Tensor, groups: int, each: int) -> list[int]:
    size = len(scores_E) // groups
    chosen = scores_E.view(groups, size).topk(each, dim=-1).indices
    return [int(expert) + group * size for group, row in enumerate(chosen) for expert in row]
