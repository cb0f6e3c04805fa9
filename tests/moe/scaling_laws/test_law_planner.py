"""The planner: printed break-evens, both kinds of budget, what is unknown, what is warned of, mistakes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe.errors import UserError
from moe.scaling_laws import laws
from moe.scaling_laws.fit import FitOptions, fit_law
from moe.scaling_laws.planner import crossings, plan
from moe.scaling_laws.ways import Question, family, fitted_curve, preset_curve
from tests.moe.scaling_laws.grids import grid, noisy_runs

LAWS = laws()


# Section B2: N1, D1, "D2* where scratch wins". The notes give the first point of a grid of tenths of a decade
# that is past it (1.6e10 is 10^10.2, 6e10 stands for 10^10.8); None is "> 1e12".
@pytest.mark.parametrize(
    ("n1", "d1", "printed", "exact"),
    [
        (1e8, 1e10, 1.6e10, 1.33e10),
        (1e9, 1e10, 8e9, 7.07e9),
        (1e9, 1e11, 6e10, 5.06e10),
        (1e9, 1e12, None, None),
        (7e9, 1e11, 2e10, 1.95e10),
        (7e9, 1e12, 1.6e11, 1.58e11),
    ],
)
def test_printed_break_evens(n1: float, d1: float, printed: float | None, exact: float | None) -> None:
    found = plan(Question(n1, d1, budget_tokens=1e10), family("liew")).upcycle_against_scratch
    assert found is not None and found.interval is None
    if printed is None or exact is None:
        assert found.tokens is None and "upcycle is better at every" in found.says
        return
    assert found.tokens == pytest.approx(exact, rel=0.005)
    on_grid = 10 ** (math.ceil(math.log10(exact) * 10) / 10)
    half_digit = (
        0.05e10
        if printed in (1.6e10,)
        else 0.05e11
        if printed == 1.6e11
        else 0.5 * 10 ** math.floor(math.log10(printed))
    )
    assert on_grid == pytest.approx(printed, abs=half_digit)


def test_the_break_even_is_where_the_losses_meet() -> None:
    curves = family("liew")
    star = plan(Question(1e9, 1e11, budget_tokens=1e10), curves).upcycle_against_scratch
    assert star is not None and star.tokens is not None
    for factor, best in ((0.99, "upcycle"), (1.01, "scratch")):
        found = plan(Question(1e9, 1e11, budget_tokens=star.tokens * factor), curves)
        assert found.best == best and found.is_close and "Too close to call" in found.recommendation
    losses = [outcome.loss for outcome in plan(Question(1e9, 1e11, star.tokens), curves).outcomes[:2]]
    # The crossing is interpolated between points 1.2 % apart: the gap is left with its curvature there.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_few_tokens_more_tokens_many_tokens() -> None:
    """At 1B after 1e11 tokens: go on, then upcycle (from 1.3e10), then start over (from 5e10)."""
    curves = family("liew")
    best = [plan(Question(1e9, 1e11, budget_tokens=d2), curves).best for d2 in (2e9, 3e10, 3e11)]
    assert best == ["continue", "upcycle", "scratch"]
    found = plan(Question(1e9, 1e11, budget_tokens=3e10), curves).continue_against_upcycle
    assert found is not None and found.tokens == pytest.approx(1.28e10, rel=0.01)


def test_a_published_law_does_not_pretend_to_know_its_spread() -> None:
    found = plan(Question(1e9, 1e11, budget_tokens=3e10), family("liew"))
    assert found.chance is None and all(outcome.interval is None for outcome in found.outcomes)
    assert "unknown" in found.recommendation
    # 6 N D of the dense model; nobody said how large the mixture is.
    assert [outcome.flops for outcome in found.outcomes] == [None, None, 6 * 1e9 * 3e10]


def test_a_budget_in_flops_pays_for_fewer_tokens_of_the_mixture() -> None:
    question = Question(1e9, 1e11, budget_flops=1.2e20, active_params=2e9)
    found = plan(question, family("liew"))
    assert [outcome.tokens for outcome in found.outcomes] == pytest.approx([1e10, 1e10, 2e10])
    assert [outcome.flops for outcome in found.outcomes] == pytest.approx([1.2e20] * 3)
    by_tokens = plan(Question(1e9, 1e11, budget_tokens=1e10), family("liew"))
    assert found.outcomes[0].loss == by_tokens.outcomes[0].loss
    assert found.upcycle_against_scratch == by_tokens.upcycle_against_scratch
    later, sooner = found.continue_against_upcycle, by_tokens.continue_against_upcycle
    assert later is not None and sooner is not None and later.tokens is not None and sooner.tokens is not None
    assert later.tokens > sooner.tokens


def test_extrapolation_is_warned_of() -> None:
    inside = plan(Question(1e9, 1e11, budget_tokens=3e10), family("liew"))
    assert not any("outside" in text for text in inside.outcomes[0].warnings)
    far = plan(Question(7e9, 2e12, budget_tokens=1e8, num_experts=64, top_k=4), family("liew"))
    text = " ".join(far.outcomes[0].warnings)
    for name in ("dense_params 7e+09", "dense_tokens 2e+12", "tokens 1e+08", "num_experts 64", "top_k 4"):
        assert name in text


def test_the_joint_law_knows_two_of_the_ways() -> None:
    question = Question(1e9, 2e10, budget_tokens=5e10, active_params=1e9, num_experts=16, top_k=1)
    found = plan(question, family("joint_moe"))
    upcycle, scratch, dense = found.outcomes
    assert upcycle.loss is None and scratch.loss is not None and dense.loss is not None
    assert found.upcycle_against_scratch is None and "no law predicts upcycle" in found.recommendation
    law = LAWS["joint_moe"]
    p = law.presets[0].coefficients
    assert scratch.loss == law.predict(p, {"active_params": 1e9, "tokens": 5e10, "num_experts": 16})
    assert dense.loss == law.predict(p, {"active_params": 1e9, "tokens": 7e10, "num_experts": 1})


def test_fitted_laws_bring_their_uncertainty() -> None:
    """Laws fitted to runs that the published ones generate: intervals hold what these say."""
    sizes, tokens = np.geomspace(3e7, 1e9, 4), np.geomspace(2e9, 2e11, 5)
    options = FitOptions(starts=32, finish=1, bootstrap=60, hold_out=False)
    published = family("liew")
    curves = {}
    for way, columns in (
        ("upcycle", grid(dense_params=sizes, dense_tokens=tokens, tokens=tokens)),
        ("scratch", grid(params=sizes, tokens=tokens)),
        ("continue", grid(params=sizes, tokens=tokens)),
    ):
        curve = published[way]  # type: ignore[index]
        names = dict(zip(curve.law.names, curve.coefficients, strict=True))
        fit = fit_law(curve.law, noisy_runs(curve.law, names, columns, 2e-4), options)
        curves[way] = fitted_curve(fit, "runs.csv")
    question = Question(1e9, 1e11, budget_tokens=2e10)
    known, found = plan(question, published), plan(question, curves)  # type: ignore[arg-type]
    for truth, outcome in zip(known.outcomes, found.outcomes, strict=True):
        assert outcome.interval is not None and truth.loss is not None and outcome.loss is not None
        low, high = outcome.interval
        assert 0 < high - low < 0.02 and low <= outcome.loss <= high
        assert outcome.loss == pytest.approx(truth.loss, rel=2e-3)
    star, true_star = found.upcycle_against_scratch, known.upcycle_against_scratch
    assert star is not None and star.interval is not None and true_star is not None
    assert true_star.tokens is not None and star.interval[0] < true_star.tokens < star.interval[1]
    assert found.best == "upcycle" and found.chance is not None and found.chance > 0.9
    # A law without draws leaves the whole comparison without.
    mixed = plan(question, {**curves, "continue": published["continue"]})  # type: ignore[dict-item]
    assert mixed.chance is None and mixed.outcomes[0].interval is not None


def test_crossings_by_hand() -> None:
    places = np.exp(np.arange(4.0))
    rows = np.array([[2.0, 1, -1, -2], [1.0, 1, 1, 1], [-1.0, -1, 1, 1], [3.0, 1, -3, 1]])
    # Between e and e^2: halfway, and a quarter of the way.
    assert crossings(places, rows) == pytest.approx([np.exp(1.5), np.inf, 0.0, np.exp(1.25)])


@pytest.mark.parametrize(
    ("question", "names"),
    [
        (Question(1e9, 1e11), ["budget"]),
        (Question(1e9, 1e11, 1e10, 1e20, 1e9), ["budget"]),
        (Question(1e9, 1e11, budget_flops=1e20), ["active_params"]),
        (Question(-1e9, math.nan, 1e10, top_k=9), ["dense_params", "dense_tokens", "top_k"]),
        (Question(1e9, 1e11, 1e10, num_experts=0, top_k=0), ["top_k"]),
    ],
)
def test_mistakes_in_a_question(question: Question, names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan(question, family("liew"))
    assert [mistake.path for mistake in caught.value.mistakes] == names


def test_laws_that_do_not_fit_the_way() -> None:
    question = Question(1e9, 1e11, budget_tokens=1e10)
    chinchilla = preset_curve("chinchilla", "besiroglu-2024")
    cases = {
        "upcycle": {"upcycle": chinchilla, "continue": chinchilla},
        "scratch": {"scratch": preset_curve("clark", "s-base"), "continue": chinchilla},
        "laws": {"continue": chinchilla},
        "total_params": {"scratch": preset_curve("apple", "abnar-2025"), "continue": chinchilla},
        "active_params": {"scratch": preset_curve("joint_moe", "ludziejewski-2025"), "continue": chinchilla},
    }
    for path, curves in cases.items():
        with pytest.raises(UserError) as caught:
            plan(question, curves)  # type: ignore[arg-type]
        assert [mistake.path for mistake in caught.value.mistakes] == [path]
