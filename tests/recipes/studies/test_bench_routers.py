"""What routers cost: the labels, the memory counter, the limits, and the shape of the figures. No times."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench.timing import Timing
from moe.errors import ConfigError, UserError
from moe.routers.configs.ssr_config import SSRConfig
from recipes.studies.benchmarks.live_bytes import LiveBytes, peak_bytes
from recipes.studies.benchmarks.moe_tax import StepShape
from recipes.studies.benchmarks.router_candidates import SOLVERS, Shape, read_candidates
from recipes.studies.benchmarks.router_grid import Grid, Limits, render
from recipes.studies.benchmarks.router_step import (
    Expected,
    RouterStep,
    bootstrap_interval,
    expected_costs,
    measure_steps,
    render_steps,
    verdict,
)
from recipes.studies.option_lists import conf_choices
from tools import bench_routers

CPU = torch.device("cpu")
PLENTY = Limits(rounds=3, seconds=1e6, num_bytes=2**30)


def test_labels_are_composed_as_a_run_would() -> None:
    candidates = read_candidates(
        ["ssr", "ssr[probability=0.5, cost=linear]", "keyed[edges=[1.0,2.0]]", "solver:sinkhorn"]
    )
    assert [candidate.label for candidate in candidates][:2] == ["ssr", "ssr[probability=0.5, cost=linear]"]
    plain, other, keyed, solver = (candidate.config for candidate in candidates)
    assert plain == SSRConfig()
    assert other == SSRConfig(probability=0.5, cost="linear")
    assert keyed is not None and vars(keyed)["edges"] == [1.0, 2.0]
    assert solver is None


def test_mistakes_in_labels_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read_candidates(["nope", "ssr[probabilty=1]", "ssr[probability=7]", "top k", "topk", "topk"])
    text = str(caught.value)
    assert "--routers nope: router='nope': there is no such choice" in text
    assert "router.probabilty='probabilty': the router has no such option. It has: name, top_k, " in text
    assert "share of the steps" in text
    assert "'top k': it cannot be read" in text
    assert "--routers='topk': it stands there twice" in text


def test_peak_of_a_computation_worked_by_hand() -> None:
    x = torch.zeros(256)  # 1 KiB, and known

    def run() -> None:
        a = x + 1  # 1 KiB
        b = torch.cat([a, a])  # 2 KiB more: 3 KiB, the peak
        del a  # 2 KiB
        (b[:128] * 2).sum()  # half a KiB and 4 bytes more; views of b are b

    assert peak_bytes(run, [x], CPU) == 3 * 1024
    assert peak_bytes(lambda: x.view(2, 128), [x], CPU) == 0


def test_what_autograd_keeps_counts_until_backward() -> None:
    x = torch.ones(256, requires_grad=True)
    live = LiveBytes([x])
    with live:
        total = (x.exp() * 2).sum()
        assert live.now == 1024 + 4, "exp's result is kept, its double is not"
        total.backward()
        del total
        assert x.grad is not None and live.now == 1024
        x.grad = None
        assert live.now == 0


@pytest.mark.parametrize("name", [*conf_choices("router"), "ssr[probability=1]", *SOLVERS])
@pytest.mark.usefixtures("one_thread")
def test_every_choice_runs(name: str) -> None:
    (candidate,) = read_candidates([name])
    assert candidate.unsupported_reason(4) is None
    once = candidate.prepare(Shape(tokens=12, experts=4, width=8), CPU)
    first, second = dict(once.run()), dict(once.run())
    assert first == second and all(isinstance(value, float) for value in first.values())
    if candidate.config is not None:
        assert first["slots"] >= 1
    assert peak_bytes(once.run, once.known, CPU) == peak_bytes(once.run, once.known, CPU) > 0


def test_skewed_logits_are_what_they_are_said_to_be() -> None:
    shape = Shape(tokens=4096, experts=16, width=256, skewed=True)
    (candidate,) = read_candidates(["topk"])
    once = candidate.prepare(shape, CPU)
    x_TD, weight_ED = once.known[:2]
    logits_TE = (x_TD @ weight_ED.t()).detach()
    # The weights are 16 draws, so that the spread of 16 offsets is known to a fifth.
    assert logits_TE.sub(logits_TE.mean(0)).std().item() == pytest.approx(1.0, rel=0.1)
    assert logits_TE.mean(0).std().item() == pytest.approx(1.5, rel=0.6)


@pytest.mark.usefixtures("one_thread")
def test_a_grid_measures_skips_and_refuses_by_name() -> None:
    candidates = read_candidates(["topk", "hash", "skywork", "soft_moe[slots_per_expert=4096]"])
    grid = Grid(candidates, Limits(rounds=3, seconds=1e6, num_bytes=2**22), CPU)
    topk, hashed, skywork, soft = grid.measure(Shape(tokens=16, experts=2, width=8))
    assert topk.left_out is None and topk.seconds is not None and topk.ratio is not None
    assert topk.seconds.rounds == 3 and topk.ratio == Timing(1.0, 1.0, 1.0, 3)
    assert topk.notes["slots"] == 2 and hashed.notes == {"slots": 1}
    assert topk.peak_bytes is not None and 16 * 8 * 4 < topk.peak_bytes < 2**16
    assert skywork.left_out is not None and skywork.left_out.startswith("refused: two normalised logits")
    assert soft.left_out is not None and soft.left_out.startswith("skipped: estimated ")
    assert soft.left_out.endswith("MiB, and 4 MiB are allowed.") and soft.seconds is None
    text = render([topk, hashed, skywork, soft], grid.baseline)
    assert "T=16 E=2, x: ratio to topk" in text and "refused: two" in text and "skipped: est" in text


@pytest.mark.usefixtures("one_thread")
def test_what_takes_too_long_is_skipped_with_its_estimate() -> None:
    grid = Grid(read_candidates(["sigmoid"]), Limits(rounds=3, seconds=1e-9, num_bytes=2**30), CPU)
    (cell,) = grid.measure(Shape(tokens=16, experts=2, width=8))
    assert cell.left_out is not None and "s for 3 rounds, and 1e-09 s are allowed." in cell.left_out
    assert grid.baseline == "sigmoid"


@pytest.mark.usefixtures("one_thread")
def test_training_steps_and_the_mean_cost_of_rare_ones() -> None:
    candidates = read_candidates(
        ["topk", "ssr[probability=0.25]", "ssr[probability=1]", "skywork", "solver:sinkhorn"]
    )
    shape = StepShape(2, 1, 16, hidden_size=16, num_layers=1, vocab_size=32, batch_size=2, seq_len=8)
    steps = {step.router: step for step in measure_steps(candidates, shape, 3, CPU)}
    assert list(steps) == ["skywork", "topk", "ssr[probability=0.25]", "ssr[probability=1]"]
    assert steps["skywork"].refused is not None and steps["skywork"].seconds is None
    topk, rare, always = list(steps.values())[1:]
    assert topk.ratio == Timing(1.0, 1.0, 1.0, 3) and topk.ratio_interval == (1.0, 1.0)
    assert topk.alone is not None and topk.alone > 0
    (mean,) = expected_costs(candidates, list(steps.values()))
    assert rare.ratio is not None and always.ratio is not None
    assert mean.router == "ssr[probability=0.25]"
    assert mean.ratio == pytest.approx(0.75 * rare.ratio.median + 0.25 * always.ratio.median)
    worked = [
        RouterStep(s.router, Timing(1.0, 1.0, 1.0, 3), s.ratio, (1.0, 1.0)) for s in (topk, rare, always)
    ]
    worked = [dataclasses.replace(s, alone=t) for s, t in zip(worked, (0.1, 0.2, 0.6), strict=True)]
    (mean,) = expected_costs(candidates, worked)
    # A step of 1 s: the routers take 0.75 * 0.2 + 0.25 * 0.6 = 0.3 s in place of 0.1 s.
    assert mean.ratio_by_share == pytest.approx(1.2)


def test_the_table_of_steps() -> None:
    timing = Timing(0.1, 0.09, 0.12, 5)
    steps = [
        RouterStep("topk", timing, Timing(1.0, 1.0, 1.0, 5), (1.0, 1.0), 0.002),
        RouterStep("ssr", timing, Timing(1.001, 0.99, 1.01, 5), (0.995, 1.01), 0.002),
    ]
    text = render_steps(steps, [Expected("ssr", 0.001, 1.0021, 1.0002)], 1.02)
    assert "0.995-1.010" in text and "2.0%" in text
    assert "ssr: 1.0021 x topk in the mean (1.0002 by the routers alone), with 0.10% of steps" in text
    assert text.endswith("Ordinary steps within 2%: yes.")
    assert verdict(RouterStep("a", ratio_interval=(1.03, 1.04)), 1.02) == "no"
    assert verdict(RouterStep("a", ratio_interval=(1.01, 1.04)), 1.02) == "the interval holds both"


def test_the_interval_holds_the_median() -> None:
    # Ratios 1 to 5: half of the resamples have a median of 3, and few have 1 or 5.
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert low <= 2.0 and high >= 4.0
    assert bootstrap_interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_routers", *arguments])
    return bench_routers.main()


@pytest.mark.usefixtures("one_thread")
def test_the_figures_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    few = ["--tokens", "16", "8", "--experts", "4", "--width", "8", "--rounds", "2"]
    assert _run(monkeypatch, *few, "--routers", "topk", "ssr", "--json", str(path)) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    assert {"machine", "cores", "torch", "threads", "device", "limits", "baseline"} <= figures.keys()
    assert [(c["router"], c["tokens"]) for c in figures["cells"]] == [
        ("topk", 8), ("ssr", 8), ("topk", 16), ("ssr", 16)
    ]  # fmt: skip
    cell = figures["cells"][1]
    assert cell["left_out"] is None and cell["experts"] == 4
    assert {"median", "p10", "p90", "rounds"} == cell["seconds"].keys() == cell["ratio"].keys()
    assert cell["notes"]["transported"] == 0.0 and cell["peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "T=16 E=4" in printed


def test_mistakes_on_the_command_line_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [
        "--tokens",
        "0",
        "--rounds",
        "-1",
        "--seconds",
        "0",
        "--json",
        str(tmp_path),
        "--routers",
        "nope",
    ]
    with pytest.raises(UserError) as caught:
        _run(monkeypatch, *wrong)
    text = str(caught.value)
    for expected in (
        "--tokens=0: it must be 1 or more. Raise it.",
        "--rounds=-1: it must be 1 or more",
        "--seconds=0.0: it must be above 0",
        "is a folder",
        "router='nope': there is no such choice",
    ):
        assert expected in text
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device='cuda': this torch sees no GPU"):
            _run(monkeypatch, "--device", "cuda")
