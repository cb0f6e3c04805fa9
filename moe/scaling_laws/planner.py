"""Comparison of upcycling a dense checkpoint, training an MoE from scratch, and continued dense training.

Letters: B bootstrap draws, P parameters of a law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe.scaling_laws.base import outside
from moe.scaling_laws.design import FLOPS_PER_PARAMETER
from moe.scaling_laws.ways import (
    ASSUMPTIONS,
    WAYS,
    Curve,
    Question,
    Way,
    check_question,
    columns_of,
    loss_at,
    paid_by,
    tokens_of,
)

Array = NDArray[np.float64]

# Relative differences below this are insignificant: the joint law misses its own runs by .0062.
CLOSE = 0.01
# Range of the search for a break-even.
TOKENS = (1e7, 1e15)


@dataclass(frozen=True)
class Outcome:
    """Prediction for one way. None means unknown, never zero.

    Attributes:
        way: The way.
        tokens: Tokens of further training.
        flops: Its cost; None if the size of the MoE is unknown.
        loss: Predicted loss; None without a law.
        interval: Interval of the loss from bootstrap draws; None for published coefficients.
        law: Name and source of the law; "" without one.
        assumption: Assumption behind the prediction.
        warnings: Extrapolations and cautions.
    """

    way: Way
    tokens: float
    flops: float | None
    loss: float | None
    interval: tuple[float, float] | None
    law: str
    assumption: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BreakEven:
    """Number of tokens above which one way is better than another.

    Attributes:
        tokens: D2* of the MoE; None if the curves do not cross between `TOKENS`.
        interval: Interval from bootstrap draws of both laws; None if one has none. An end is 0 if the other
            way is better from the start, infinite if it never is.
        says: The result as a sentence.
    """

    tokens: float | None
    interval: tuple[float, float] | None
    says: str


@dataclass(frozen=True)
class Plan:
    """Result of the comparison.

    Attributes:
        outcomes: The three ways.
        best: The way of least predicted loss.
        chance: Share of the bootstrap draws in which it is best; None without draws of every law.
        is_close: True if another way is within `CLOSE` of it, or the draws disagree.
        upcycle_against_scratch: D2* up to which upcycling beats training from scratch.
        continue_against_upcycle: D2 above which upcycling beats continued dense training.
        recommendation: Recommendation in a sentence or two.
    """

    outcomes: tuple[Outcome, ...]
    best: Way
    chance: float | None
    is_close: bool
    upcycle_against_scratch: BreakEven | None
    continue_against_upcycle: BreakEven | None
    recommendation: str


def plan(question: Question, curves: Mapping[Way, Curve]) -> Plan:
    """Compares the three ways.

    Args:
        question: The dense checkpoint, the MoE and the budget.
        curves: The law of each way, for one data set and tokenizer; ways without one are left open.

    Raises:
        UserError: The question is incomplete or impossible, or no two ways have a law.
    """
    check_question(question, curves)
    tokens = {way: tokens_of(question, way) for way in WAYS}
    outcomes = tuple(_outcome(question, way, curves.get(way), tokens[way]) for way in WAYS)
    losses = {outcome.way: outcome.loss for outcome in outcomes if outcome.loss is not None}
    best = min(losses, key=lambda way: losses[way])
    second = min(loss for way, loss in losses.items() if way != best)
    chance = _chance(question, curves, best, tokens)
    is_close = second / losses[best] - 1 < CLOSE or (chance is not None and chance < 0.9)
    scratch = continued = None
    if "upcycle" in curves and "scratch" in curves:
        scratch = _break_even(question, curves, "upcycle", "scratch")
    if "upcycle" in curves and "continue" in curves:
        continued = _break_even(question, curves, "continue", "upcycle")
    text = _recommend(outcomes, best, second, chance, is_close)
    return Plan(outcomes, best, chance, is_close, scratch, continued, text)


def _outcome(question: Question, way: Way, curve: Curve | None, tokens: float) -> Outcome:
    size = question.dense_params if way == "continue" else question.active_params
    flops = None if size is None else FLOPS_PER_PARAMETER * size * tokens
    if curve is None:
        return Outcome(way, tokens, flops, None, None, "", "no law was given for this way", ())
    loss = float(loss_at(question, way, curve, tokens))
    interval = None
    if curve.draws is not None:
        interval = _interval(loss_at(question, way, curve, tokens, draws=True), curve.level)
    warnings = outside(curve.ranges, columns_of(question, way, curve.law, tokens))
    warnings += [curve.caution] if curve.caution else []
    return Outcome(
        way,
        tokens,
        flops,
        loss,
        interval,
        curve.source,
        ASSUMPTIONS[way],
        tuple(warnings),
    )


def _interval(values: Array, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def _chance(
    question: Question, curves: Mapping[Way, Curve], best: Way, tokens: Mapping[Way, float]
) -> float | None:
    """Returns the share of draws in which the best way is best. Draws of separate fits pair by number."""
    if any(curve.draws is None for curve in curves.values()):
        return None
    drawn = {way: loss_at(question, way, curve, tokens[way], draws=True) for way, curve in curves.items()}
    count = min(len(losses) for losses in drawn.values())
    others = np.min([losses[:count] for way, losses in drawn.items() if way != best], axis=0)
    return float(np.mean(drawn[best][:count] <= others))


def _break_even(question: Question, curves: Mapping[Way, Curve], until: Way, then: Way) -> BreakEven:
    """Computes D2 above which ``then`` is better, and below which ``until`` is."""
    pair = (curves[until], curves[then])
    grid = np.geomspace(*TOKENS, 1601)
    tokens = float(crossings(grid, _gaps(question, curves, (until, then), grid, draws=False))[0])
    interval = None
    if all(curve.draws is not None for curve in pair):
        drawn = crossings(grid, _gaps(question, curves, (until, then), grid, draws=True))
        interval = _interval(drawn, min(curve.level for curve in pair))
    if tokens in (0.0, np.inf):
        leader = until if tokens else then
        return BreakEven(None, interval, f"{leader} is better at every token count considered")
    says = f"up to about {tokens:.2g} tokens {until} is better, from there on {then}"
    if any(outside(curve.ranges, {"tokens": tokens}) for curve in pair):
        says += "; that is outside of the range of the fit, so an order of magnitude at best"
    return BreakEven(tokens, interval, says)


def _gaps(
    question: Question, curves: Mapping[Way, Curve], pair: tuple[Way, Way], grid: Array, *, draws: bool
) -> Array:
    """Returns the excess of the second way's loss over the first's, ``[B, X]``, by the MoE's tokens."""
    losses = []
    for way in pair:
        tokens = paid_by(question, way, grid)
        losses.append(np.atleast_2d(loss_at(question, way, curves[way], tokens, draws)))
    count = min(len(rows) for rows in losses)
    return np.asarray(losses[1][:count] - losses[0][:count])


def crossings(grid: Array, gaps: Array) -> Array:
    """Finds where each row first falls through zero, interpolated in the logarithm of the grid.

    Args:
        grid: Increasing, ``[X]``.
        gaps: ``[B, X]``.

    Returns:
        ``[B]``: 0 if a row is at or below zero from the start, infinite if it never is.
    """
    place = np.log(grid)
    found = np.empty(len(gaps))
    for i, row in enumerate(gaps):
        below = np.flatnonzero(row <= 0)
        if not len(below):
            found[i] = np.inf
        elif below[0] == 0:
            found[i] = 0.0
        else:
            k = int(below[0]) - 1
            share = row[k] / (row[k] - row[k + 1])
            found[i] = np.exp(place[k] + share * (place[k + 1] - place[k]))
    return found


def _recommend(
    outcomes: tuple[Outcome, ...], best: Way, second: float, chance: float | None, is_close: bool
) -> str:
    names = {
        "upcycle": "upcycle",
        "scratch": "train the MoE from scratch",
        "continue": "continue with the dense model",
    }
    chosen = next(outcome for outcome in outcomes if outcome.way == best)
    assert chosen.loss is not None
    text = f"{names[best]}: predicted loss {chosen.loss:.3f}, {second - chosen.loss:.3f} below the next best"
    open_ways = [outcome.way for outcome in outcomes if outcome.loss is None]
    if open_ways:
        text += f"; no law predicts {' and '.join(open_ways)}"
    if chance is not None:
        text += f"; it is the best in {100 * chance:.0f} % of the bootstrap draws"
    else:
        text += "; its certainty is unknown, as these coefficients come without draws"
    if is_close:
        text += ". Too close to call: train a small pilot of both before deciding"
    if chosen.warnings:
        text += ". Mind the warnings below"
    return text + "."
