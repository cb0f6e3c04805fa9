"""Area under the ROC curve, exact: no thresholds, ties count half.

Letters: N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


def roc_auc(labels_N: ArrayLike, scores_N: ArrayLike) -> float:
    """Computes the probability that a positive row scores above a negative one, plus half that of a tie.

    By the Mann-Whitney statistic: from the positives' sum of ranks, ties at their mean rank.

    Args:
        labels_N: ``[N]`` labels, 0 or 1.
        scores_N: ``[N]`` scores, on any scale.

    Raises:
        ValueError: A class is missing, or scores are not finite: the area is undefined.
    """
    positive_N = np.asarray(labels_N) > 0.5
    values_N = np.asarray(scores_N, dtype=np.float64)
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        raise ValueError(f"AUC needs both classes: {positives} positive and {negatives} negative rows.")
    if not np.isfinite(values_N).all():
        raise ValueError(f"AUC needs finite scores: {int((~np.isfinite(values_N)).sum())} are not.")
    rank_sum = float(rankdata(values_N)[positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
