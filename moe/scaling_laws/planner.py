"""Whether to upcycle a dense checkpoint, train the mixture from scratch, or go on training the dense model.

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

# Losses closer than this, relatively, are no difference: the joint law misses its own runs by .0062.
CLOSE = 0.01
# Where a break-even is looked for.
TOKENS = (1e7, 1e15)


@dataclass(frozen=True)
class Outcome:
    """What one way leads to. None is unknown, never zero.

    Attributes:
        way: Which.
        tokens: It trains on, after what is there already.
        flops: It costs; None where the size of the mixture is not known.
        loss: Predicted; None where no law was given.
        interval: Of the loss, by bootstrap draws; None for published coefficients.
        law: Name and source; "" where there is none.
        assumption: What was taken for granted.
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
    """Tokens from which on one way is better than another.

    Attributes:
        tokens: D2* of the mixture; None where the curves do not cross between `TOKENS`.
        interval: By bootstrap draws of both laws; None where one has none. An end is 0 where the other way is
            better from the start, infinite where it never is.
        says: The sentence.
    """

    tokens: float | None
    interval: tuple[float, float] | None
    says: str


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        outcomes: The three ways.
        best: The way of least predicted loss.
        chance: Share of the bootstrap draws in which it is the best; None without draws of every law.
        is_close: Whether another way is within `CLOSE` of it, or the draws disagree.
        upcycle_against_scratch: D2*, up to which upcycling beats training from scratch.
        continue_against_upcycle: D2 from which on upcycling beats going on with the dense model.
        recommendation: In a sentence or two.
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
        question: What is there and what may be spent.
        curves: The law of each way, of one data set and tokenizer; ways without one are left open.

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
    """Share of the draws in which the best way is the best. Draws of separate fits pair up by number."""
    if any(curve.draws is None for curve in curves.values()):
        return None
    drawn = {way: loss_at(question, way, curve, tokens[way], draws=True) for way, curve in curves.items()}
    count = min(len(losses) for losses in drawn.values())
    others = np.min([losses[:count] for way, losses in drawn.items() if way != best], axis=0)
    return float(np.mean(drawn[best][:count] <= others))


def _break_even(question: Question, curves: Mapping[Way, Curve], until: Way, then: Way) -> BreakEven:
    """D2 from which on ``then`` is better, and ``until`` before."""
    pair = (curves[until], curves[then])
    grid = np.geomspace(*TOKENS, 1601)
    tokens = float(crossings(grid, _gaps(question, curves, (until, then), grid, draws=False))[0])
    interval = None
    if all(curve.draws is not None for curve in pair):
        drawn = crossings(grid, _gaps(question, curves, (until, then), grid, draws=True))
        interval = _interval(drawn, min(curve.level for curve in pair))
    if tokens in (0.0, np.inf):
        leader = until if tokens else then
        return BreakEven(None, interval, f"{leader} is better at every token count looked at")
    says = f"up to about {tokens:.2g} tokens {until} is better, from there on {then}"
    if any(outside(curve.ranges, {"tokens": tokens}) for curve in pair):
        says += "; that is outside of the range of the fit, an order of magnitude at best"
    return BreakEven(tokens, interval, says)


def _gaps(
    question: Question, curves: Mapping[Way, Curve], pair: tuple[Way, Way], grid: Array, *, draws: bool
) -> Array:
    """By how much the second way's loss exceeds the first's, ``[B, X]``, by the mixture's tokens."""
    losses = []
    for way in pair:
        tokens = paid_by(question, way, grid)
        losses.append(np.atleast_2d(loss_at(question, way, curves[way], tokens, draws)))
    count = min(len(rows) for rows in losses)
    return np.asarray(losses[1][:count] - losses[0][:count])


def crossings(grid: Array, gaps: Array) -> Array:
    """The first place where each row falls through zero, interpolated in the logarithm of the grid.

    Args:
        grid: Rising, ``[X]``.
        gaps: ``[B, X]``.

    Returns:
        ``[B]``: 0 where a row is at or below zero from the start, infinite where it never is.
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
        "scratch": "train the mixture from scratch",
        "continue": "go on with the dense model",
    }
    chosen = next(outcome for outcome in outcomes if outcome.way == best)
    assert chosen.loss is not None
    text = f"{names[best]}: predicted loss {chosen.loss:.3f}, {second - chosen.loss:.3f} below the next best"
    open_ways = [outcome.way for outcome in outcomes if outcome.loss is None]
    if open_ways:
        text += f"; no law says what {' and '.join(open_ways)} would give"
    if chance is not None:
        text += f"; it is the best in {100 * chance:.0f} % of the bootstrap draws"
    else:
        text += "; how sure this is, is unknown: these coefficients come without draws"
    if is_close:
        text += ". Too close to call: train a small pilot of both before deciding"
    if chosen.warnings:
        text += ". Mind the warnings below"
    return text + "."
