"""Fits: known coefficients come back, intervals hold, what runs cannot tell is said, mistakes are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from moe.errors import DataError
from moe.scaling_laws import laws
from moe.scaling_laws.columns import Runs, parse_runs
from moe.scaling_laws.fit import FitOptions, fit_law, select
from moe.scaling_laws.objective import Objective, solve_many
from tests.moe.scaling_laws.grids import TRUTH, grid, noisy_runs, paper_grid, surviving_noise

LAWS = laws()
QUICK = FitOptions(starts=64, finish=1, bootstrap=0, hold_out=False)
CHINCHILLA = LAWS["chinchilla"]
BESIROGLU = dict(CHINCHILLA.preset("besiroglu-2024").coefficients)
SMALL = grid(params=np.geomspace(5e7, 5e9, 6), tokens=np.geomspace(5e9, 5e11, 6))


@pytest.mark.parametrize("name", LAWS)
def test_known_coefficients_come_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Within 5 % each, at a noise where that is four standard errors of the worst."""
    law = LAWS[name]
    truth = dict(law.preset(TRUTH[name]).coefficients)
    noise = surviving_noise(law)
    fit = fit_law(law, noisy_runs(law, truth, paper_grid(name), noise), QUICK)
    errors = {key: abs(fit.coefficients[key] / value - 1) for key, value in truth.items()}
    with capsys.disabled():
        worst = max(errors, key=lambda key: errors[key])
        print(f"\n{name}: noise {noise:.1e}, worst {worst} off by {100 * errors[worst]:.2f} %")
    assert max(errors.values()) < 0.05, errors
    assert not fit.undetermined
    # As many degrees of freedom as coefficients are fitted away.
    expected = noise * np.sqrt(1 - len(truth) / fit.count)
    assert fit.rmse == pytest.approx(expected, rel=4 / np.sqrt(2 * fit.count))


@pytest.mark.parametrize("name", LAWS)
def test_without_noise_they_come_back_exactly(name: str) -> None:
    law = LAWS[name]
    truth = dict(law.preset(TRUTH[name]).coefficients)
    fit = fit_law(law, noisy_runs(law, truth, paper_grid(name), 0.0), replace(QUICK, starts=128))
    # L-BFGS stops at an objective near 1e-13, residuals of 1e-10; the worst coefficient is 700 times these.
    assert fit.coefficients == pytest.approx(truth, rel=1e-5)


def test_the_objective_is_scipys_huber_loss() -> None:
    """The slow, obvious way: least_squares with Huber's loss from the truth, derivatives by differences."""
    runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 3e-3)
    fit = fit_law(CHINCHILLA, runs, QUICK)
    log_losses = np.log(runs.columns["loss"])

    def residuals(values: np.ndarray) -> np.ndarray:
        a, alpha, b, beta, e = values
        size = np.exp(a) / runs.columns["params"] ** alpha
        return np.log(size + np.exp(b) / runs.columns["tokens"] ** beta + np.exp(e)) - log_losses

    start = [np.log(482.01), 0.3478, np.log(2085.43), 0.3658, np.log(1.8172)]
    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    slow = least_squares(residuals, start, loss="huber", f_scale=1e-3, x_scale="jac", max_nfev=5000, **tight)
    assert fit.objective <= slow.cost / 1e-6 * (1 + 1e-6)
    found = fit.coefficients
    assert (np.log(found["A"]), found["alpha"]) == pytest.approx((slow.x[0], slow.x[1]), rel=2e-3)


def test_outliers_are_shrugged_off() -> None:
    runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 1e-4)
    losses = runs.columns["loss"].copy()
    losses[[7, 20]] *= 1.2  # two runs that diverged
    robust = fit_law(CHINCHILLA, Runs("runs.csv", {**runs.columns, "loss": losses}), QUICK)
    squares = fit_law(
        CHINCHILLA, Runs("runs.csv", {**runs.columns, "loss": losses}), replace(QUICK, delta=0.9)
    )
    assert robust.coefficients["E"] == pytest.approx(BESIROGLU["E"], rel=0.01)
    assert abs(squares.coefficients["E"] / BESIROGLU["E"] - 1) > 0.01


def test_bootstrap_draws_are_fits_to_the_runs_drawn() -> None:
    """Solved together, near the answer; each against a fit of its own, by L-BFGS from many starts."""
    runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 2e-3)
    fit = fit_law(CHINCHILLA, runs, replace(QUICK, bootstrap=20, seed=3))
    weights = np.random.default_rng([3, 1]).multinomial(36, np.full(36, 1 / 36), size=20)
    for draw, weight in zip(fit.draws[:3], weights[:3], strict=True):
        index = np.repeat(np.arange(36), weight)
        part = Runs("runs.csv", {name: column[index] for name, column in runs.columns.items()})
        alone = fit_law(CHINCHILLA, part, QUICK)
        columns, losses = select(CHINCHILLA, part)
        objective = Objective.of(CHINCHILLA, columns, losses, 1e-3)
        theta = torch.from_numpy(CHINCHILLA.unconstrain(draw[None]))
        assert float(objective.value(theta)[0]) <= alone.objective * 1.01
    low, high = np.quantile(fit.draws, [0.025, 0.975], axis=0)
    assert fit.intervals is not None
    assert fit.intervals["alpha"] == pytest.approx((low[1], high[1]))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """24 tables, five coefficients: 80 % intervals hold it 62 to 95 % of the time (the five go together)."""
    held = []
    for seed in range(24):
        runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 2e-4, seed)
        options = FitOptions(starts=16, finish=1, bootstrap=80, level=0.8, hold_out=False)
        intervals = fit_law(CHINCHILLA, runs, options).intervals
        assert intervals is not None
        held.append([low <= BESIROGLU[name] <= high for name, (low, high) in intervals.items()])
    assert 0.62 <= np.mean(held) <= 0.95


def test_a_fit_is_the_same_twice() -> None:
    runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 1e-3)
    options = replace(QUICK, bootstrap=10)
    first, second = (fit_law(CHINCHILLA, runs, options) for _ in range(2))
    assert first.coefficients == second.coefficients
    np.testing.assert_array_equal(first.draws, second.draws)
    assert torch.get_num_threads() >= 1


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    solve_many(
        Objective.of(CHINCHILLA, SMALL, CHINCHILLA.predict(BESIROGLU, SMALL), 1e-3), np.zeros((4, 5)), steps=1
    )
    fit_law(CHINCHILLA, noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 0.0), QUICK)
    assert torch.get_num_threads() == before


def test_held_out_error_is_of_the_runs_of_lowest_loss() -> None:
    runs = noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 1e-4)
    assert fit_law(CHINCHILLA, runs, replace(QUICK, hold_out=True)).held_out_rmse == pytest.approx(
        1e-4, rel=2
    )
    losses = runs.columns["loss"].copy()
    lowest = np.argsort(losses)[:7]
    losses[lowest] *= 0.97  # a law that does not reach so far
    bent = fit_law(
        CHINCHILLA, Runs("runs.csv", {**runs.columns, "loss": losses}), replace(QUICK, hold_out=True)
    )
    assert bent.held_out_rmse == pytest.approx(-np.log(0.97), rel=0.05)


def test_too_few_runs_for_a_held_out_error() -> None:
    few = {
        name: column[:8] for name, column in noisy_runs(CHINCHILLA, BESIROGLU, SMALL, 1e-4).columns.items()
    }
    few["params"] = few["params"] * np.linspace(1, 3, 8)
    fit = fit_law(CHINCHILLA, Runs("runs.csv", few), replace(QUICK, starts=8, hold_out=True))
    assert fit.held_out_rmse is None and "too few" in fit.notes[0]


def test_what_makes_up_for_each_other_is_said() -> None:
    """Size and data in a fixed ratio with equal exponents: A and B cannot be told apart."""
    sizes = np.geomspace(5e7, 5e9, 12)
    truth = {"A": 400.0, "alpha": 0.3, "B": 400.0, "beta": 0.3, "E": 1.7}
    runs = noisy_runs(CHINCHILLA, truth, {"params": sizes, "tokens": 20 * sizes}, 1e-3)
    fit = fit_law(CHINCHILLA, runs, replace(QUICK, bootstrap=60))
    assert {"A", "B"} <= set(fit.undetermined), fit.undetermined
    assert fit.rmse < 2e-3


def test_a_coefficient_that_runs_away_is_said() -> None:
    """No floor in the runs: E goes to zero."""
    truth = {"A": 400.0, "alpha": 0.3, "B": 400.0, "beta": 0.3, "E": 1e-5}
    fit = fit_law(
        CHINCHILLA, noisy_runs(CHINCHILLA, truth, SMALL, 1e-3, seed=5), replace(QUICK, bootstrap=60)
    )
    assert "E" in fit.undetermined and "A" not in fit.undetermined


def test_clark_without_the_saturation_says_so() -> None:
    law = LAWS["clark"]
    columns = grid(active_params=np.geomspace(15e6, 1.3e9, 6), num_experts=[1, 2, 4])
    runs = noisy_runs(law, dict(law.preset("s-base").coefficients), columns, 1e-3)
    assert "E_max" in fit_law(law, runs, replace(QUICK, bootstrap=60)).undetermined


TABLE = "loss,params,tokens,who\n" + "".join(f"{3 - i / 20},{1 + i}e8,{2 + i % 3}e9,me\n" for i in range(8))


def test_a_table_is_read() -> None:
    runs = parse_runs("\ufeff# made by hand\n" + TABLE + "\n", "runs.csv")
    assert runs.count == 8 and runs.ignored == ("who",)
    assert runs.columns["params"][:2].tolist() == [1e8, 2e8]
    mixed = parse_runs("loss,num_experts,top_k\n3,8,2\n", "runs.csv")
    assert mixed.columns["sparsity"].tolist() == [0.75]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it holds no runs"),
        ("loss,params\n", "it holds no runs"),
        (TABLE.replace("who", "params"), "two columns have this name"),
        ("a,b\n1,2\n", "names no known column"),
        (TABLE.replace("1e8,", "", 1), "the header has 4 columns, this line 3"),
        (TABLE.replace("1e8", "many", 1), "params is no number"),
        (TABLE.replace("1e8", "nan", 1), "params: it must be a finite number"),
        (TABLE.replace("1e8", "-1e8", 1), "params: it must be more than 0"),
        (TABLE.replace("\n3.0,", "\n-3.0,", 1), "loss: it must be more than 0"),
        ("loss,sparsity\n3,1.0\n", "sparsity: it must be less than 1"),
        ("loss,num_experts\n3,0\n", "num_experts: it must be at least 1"),
    ],
)
def test_mistakes_in_a_table(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_runs(text, "runs.csv")
    assert said in str(caught.value) and "runs.csv" in str(caught.value)


def test_every_bad_line_is_named() -> None:
    with pytest.raises(DataError) as caught:
        parse_runs(TABLE.replace("2e9", "x"), "runs.csv")
    assert [m.path for m in caught.value.mistakes] == ["runs.csv:2", "runs.csv:5", "runs.csv:8"]


def test_mistakes_for_a_law_come_all_at_once() -> None:
    runs = parse_runs("loss,params,num_experts\n3,1e8,8\n2.9,1e8,\n", "runs.csv")
    with pytest.raises(DataError) as caught:
        fit_law(LAWS["chinchilla"], runs, QUICK)
    said = [m.rule for m in caught.value.mistakes]
    assert said == [
        "params is 1e+08 in every run, so that nothing can be learned about it",
        "chinchilla needs this column",
        "chinchilla has 5 coefficients and needs 7 runs or more",
    ]
    with pytest.raises(DataError, match="num_experts is empty in run 2"):
        fit_law(LAWS["clark"], runs, QUICK)
