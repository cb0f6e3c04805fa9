"""What the two ranks of a hand-worked exchange count."""

from __future__ import annotations

import torch

from recipes.studies.benchmarks.dispatch_bytes import DispatchShape, RankFigures, measure_rank

#: Experts 0 and 1 are on rank 0, 2 and 3 on rank 1.
IDS = ([[0, 1], [0, 2], [2, 3]], [[0, 1], [2, 3], [3, 2]])
SHAPE = DispatchShape(tokens=3, width=3, experts=4, top_k=2, dtype="fp32")


def count(rank: int, ranks: int) -> RankFigures:
    """Of one rank."""
    return measure_rank(SHAPE, torch.tensor(IDS[rank]), rank, ranks, rounds=3)
