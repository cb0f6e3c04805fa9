"""AUC by ranks against the definition: every pair of a positive and a negative row."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.studies.tables.auc import roc_auc


def pairwise(labels: list[int], scores: list[float]) -> float:
    """The definition, pair by pair."""
    positives = [s for s, y in zip(scores, labels, strict=True) if y]
    negatives = [s for s, y in zip(scores, labels, strict=True) if not y]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def test_by_hand() -> None:
    # Positives 0.8 and 0.4, negatives 0.4 and 0.1: wins 1 + 1, tie 0.5 + win 1, of 4 pairs.
    assert roc_auc([1, 0, 1, 0], [0.8, 0.4, 0.4, 0.1]) == 3.5 / 4
    assert roc_auc([1, 0], [2.0, 1.0]) == 1.0
    assert roc_auc([1, 0], [1.0, 2.0]) == 0.0
    assert roc_auc([1, 0, 0], [1.0, 1.0, 1.0]) == 0.5


@pytest.mark.parametrize("levels", [3, 20, 10**9])
def test_every_pair(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for size in (2, 7, 150):
        labels = rng.integers(2, size=size)
        labels[:2] = 0, 1
        scores = rng.integers(levels, size=size) / 7
        # Wins are multiples of a half, so that both sums are exact.
        assert roc_auc(labels, scores) == pairwise(labels.tolist(), scores.tolist())


def test_only_the_order_counts() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=99), rng.standard_normal(99)
    assert roc_auc(labels, scores) == roc_auc(labels, np.exp(scores))
    assert roc_auc(labels, scores) + roc_auc(labels, -scores) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("labels", "scores", "why"),
    [
        ([1, 1], [0.1, 0.2], "2 positive and 0 negative"),
        ([], [], "both classes"),
        ([0, 1], [0, np.nan], "1 are"),
    ],
)
def test_where_there_is_no_area(labels: list[int], scores: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        roc_auc(labels, scores)
