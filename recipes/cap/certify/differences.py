"""Differences between a program's observation and the trainer's.

Letters: S tokens of a sequence, V vocabulary, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recipes.cap.certify.observation import Observation, SequenceObservation


@dataclass(frozen=True)
class Agreement:
    """How a program's distributions agree with the trainer's on the same tokens.

    Attributes:
        tokens: Number of tokens whose prediction is compared.
        perplexity: Of the program.
        reference_perplexity: Of the trainer.
        max_logprob_diff: Largest difference of the log-probability of a token of the text.
        mean_logprob_diff: Mean of these differences, without their signs.
        mean_kl: Mean KL divergence of the program's distribution from the trainer's, in nats.
        max_kl: Largest.
        same_top: Share of positions with the same most likely token.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    max_logprob_diff: float
    mean_logprob_diff: float
    mean_kl: float
    max_kl: float
    same_top: float


def compare(reference: Observation, other: Observation) -> Agreement:
    """Compares log-probabilities, position by position."""
    diffs, kls, same, losses, wanted = [], [], [], [], []
    for tokens, one, two in _pairs(reference, other):
        mine_SV, theirs_SV = one.log_probs_SV[two.first :], two.log_probs_SV
        count = min(len(mine_SV), len(theirs_SV), len(tokens) - two.first - 1)
        rows, nexts = np.arange(count), np.asarray(tokens[two.first + 1 : two.first + 1 + count])
        mine, theirs = mine_SV[rows, nexts], theirs_SV[rows, nexts]
        diffs.append(np.abs(mine - theirs))
        floor_S = None if two.floor_S is None else two.floor_S[:count]
        kls.append(_kl(mine_SV[:count], theirs_SV[:count], floor_S))
        same.append(mine_SV[:count].argmax(-1) == theirs_SV[:count].argmax(-1))
        losses.append(-theirs)
        wanted.append(-mine)
    diff, kl = np.concatenate(diffs), np.concatenate(kls)
    return Agreement(
        tokens=len(diff),
        perplexity=math.exp(float(np.concatenate(losses).mean(dtype=np.float64))),
        reference_perplexity=math.exp(float(np.concatenate(wanted).mean(dtype=np.float64))),
        max_logprob_diff=float(diff.max()),
        mean_logprob_diff=float(diff.mean()),
        mean_kl=float(kl.mean(dtype=np.float64)),
        max_kl=float(kl.max()),
        same_top=float(np.concatenate(same).mean()),
    )


def _pairs(
    reference: Observation, other: Observation
) -> Iterator[tuple[list[int], SequenceObservation, SequenceObservation]]:
    assert [list(x) for x in reference.sequences] == [list(x) for x in other.sequences], "the same tokens"
    for tokens, one, two in zip(reference.sequences, reference.found, other.found, strict=True):
        yield list(tokens), one, two


def _kl(mine_SV: np.ndarray, theirs_SV: np.ndarray, floor_S: np.ndarray | None) -> np.ndarray:
    """Returns the KL divergence of each position; tokens at the floor of a program count as one."""
    mine_SV, theirs_SV = mine_SV.astype(np.float64), theirs_SV.astype(np.float64)
    terms_SV = np.exp(mine_SV) * (mine_SV - theirs_SV)
    if floor_S is None:
        found: np.ndarray = terms_SV.sum(-1)
        return found
    told_SV = theirs_SV > floor_S[:, None]
    left_S = 1 - (np.exp(mine_SV) * told_SV).sum(-1)
    # Steps may leave less than nothing.
    theirs_left_S = np.maximum(1 - (np.exp(theirs_SV) * told_SV).sum(-1), np.exp(floor_S.astype(np.float64)))
    rest_S = left_S * np.log(np.maximum(left_S, 1e-12) / theirs_left_S)
    told: np.ndarray = (terms_SV * told_SV).sum(-1) + rest_S
    return told


def same_experts(reference: Observation, other: Observation) -> dict[int, float]:
    """Returns, by block, the share of tokens whose set of experts is the trainer's.

    A program that tells no experts gives an empty result.
    """
    shares: dict[int, list[np.ndarray]] = {}
    for _, one, two in _pairs(reference, other):
        for layer, theirs_SK in two.experts_SK.items():
            mine_SK = np.sort(one.experts_SK[layer], -1)
            shares.setdefault(layer, []).append((mine_SK == np.sort(theirs_SK, -1)).all(-1))
    return {layer: float(np.concatenate(each).mean()) for layer, each in sorted(shares.items())}


def greedy_agreement(reference: Observation, other: Observation) -> tuple[int, int] | None:
    """Returns how many generated tokens are the trainer's up to the first that is not, and of how many."""
    if not other.greedy:
        return None
    agreed = 0
    for mine, theirs in zip(reference.greedy, other.greedy, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        agreed += differing[0] if differing else len(mine)
    return agreed, sum(map(len, reference.greedy))
