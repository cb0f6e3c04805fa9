"""One cell of the experiment: budgets, branches that are what a run of their own is, resume, mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.recipes.jobs import job_runs
from tests.recipes.jobs.job_runs import Ended, StopAt, job, rows, steps, summary, weights, write_text

pytestmark = pytest.mark.slow

# Six steps, of which the last is the decay; validated and saved every second one.
CHANGES = {"train.eval_every": 2, "optim.schedule.warmup_steps": 1, "optim.schedule.decay_fraction": 0.2}
STAGES = ("moe", "cpt", "cpt_tokens", "scratch", "scratch_0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are; they share a cache."""
    folder = tmp_path_factory.mktemp("upcycle_vs_cpt")
    write_text(folder / "text")
    return folder


def run(place: Path, name: str, changes: Mapping[str, Any], stop_at: StopAt | None = None) -> Ended:
    """Runs the recipe under a name."""
    options = CHANGES | {"data.path": str(place / "text" / "*.txt"), "run.name": name} | dict(changes)
    told = job_runs.arguments(place, options)
    with patch.object(job_runs, "arguments", lambda *given: ["+recipe=upcycle_vs_cpt", *told[1:]]):
        return job(place, stop_at=stop_at)


@pytest.fixture(scope="module")
def cell(place: Path) -> Path:
    """A run of all arms."""
    ended = run(place, "cell", {})
    assert ended.code == 0, ended.err
    return place / "outputs" / "cell"


def losses(run_dir: Path) -> dict[str, float]:
    """The finished runs of a cell."""
    return {row["model"]: row["val_loss"] for row in summary(run_dir)["results"]}


def test_every_arm_comes_to_its_budget(cell: Path) -> None:
    found = {row["model"]: row for row in summary(cell)["results"]}
    assert set(found) == {"dense", *STAGES}
    dense, moe = (found[name]["flops_per_token_train"] for name in ("dense", "moe"))
    assert moe > dense
    # A step is 4 samples of 16 tokens; the dense model was trained for 4 steps.
    trained = {name: found[name]["tokens"] // 64 for name in STAGES}
    assert trained == {
        "moe": 6, "cpt_tokens": 6, "scratch_0": 6,
        "cpt": round(6 * moe / dense), "scratch": 6 + round(4 * dense / moe),
    }  # fmt: skip
    assert found["scratch"]["total_params"] == found["moe"]["total_params"]
    served = summary(cell)["serving"]
    assert [entry["batch"] for entry in served["moe"]] == [1, 32]
    assert served["moe"][0]["distinct_experts"] == 2.0
    assert served["moe"][0]["bytes_per_token"] > served["dense"][0]["bytes_per_token"]


def test_all_see_the_same_samples(cell: Path) -> None:
    # Copies compute what the dense model does, so that the first loss is that of the same samples.
    first = {stage: rows(cell, stage)[1]["loss"] for stage in ("moe", "cpt")}
    assert first["moe"] == pytest.approx(first["cpt"], rel=1e-5)
    start = rows(cell, "moe")[0]["val_loss"]
    assert start == pytest.approx(losses(cell)["dense"], rel=1e-5)


@pytest.mark.parametrize(("branch", "stem"), [("cpt_tokens", "cpt"), ("scratch_0", "scratch")])
def test_a_branch_goes_on_from_the_longer_run(cell: Path, branch: str, stem: str) -> None:
    # Step 5 of 6 is the last at the full rate, and 4 the newest checkpoint before.
    own, longer = rows(cell, branch), rows(cell, stem)
    assert [row["step"] for row in own] == [5, 6]
    assert own[0] | {"stage": stem} == longer[5]
    assert own[1]["lr"] < longer[6]["lr"]


def test_a_branch_is_the_run_that_it_stands_for(place: Path, cell: Path) -> None:
    plain = {"optim.schedule.kind": "wsd", "run.name": "plain", "data.path": str(place / "text" / "*.txt")}
    ended = job(place, CHANGES | plain)
    assert ended.code == 0, ended.err
    expected, found = losses(place / "outputs" / "plain"), losses(cell)
    assert found["cpt_tokens"] == expected["cpt"]
    assert (found["moe"], found["dense"]) == (expected["moe"], expected["dense"])
    # From scratch, with no dense FLOPs on top, the one run is the longest.
    alone = run(place, "alone", {"upcycle_vs_cpt.arms": "scratch", "upcycle_vs_cpt.sunk_steps": "[]"})
    assert alone.code == 0, alone.err
    assert losses(place / "outputs" / "alone") == {"scratch": found["scratch_0"]}


def test_the_newest_checkpoints_stay(cell: Path) -> None:
    assert steps(cell / "checkpoints") == [6]
    assert steps(cell / "cpt_tokens" / "checkpoints") == [6]
    assert len(steps(cell / "cpt" / "checkpoints")) == len(steps(cell / "scratch" / "checkpoints")) == 1


@pytest.mark.parametrize("stage", ["cpt", "cpt_tokens", "scratch"])
def test_a_stopped_cell_goes_on_exactly(place: Path, cell: Path, stage: str) -> None:
    name = f"stopped-{stage}"
    assert run(place, name, {}, StopAt(stage, 5)).code == 130
    resumed = run(place, name, {"resume": "auto"})
    assert resumed.code == 0, resumed.err
    for each in STAGES:
        assert rows(place / "outputs" / name, each) == rows(cell, each), each
    assert losses(place / "outputs" / name) == losses(cell)


@pytest.mark.parametrize(
    "changes", [{"train.steps": 8}, {"upcycle_vs_cpt.sunk_steps": "[9]"}, {"optim.lr": 1e-4}]
)
def test_other_budgets_are_refused(place: Path, cell: Path, changes: dict[str, Any]) -> None:
    before = losses(cell)
    ended = run(place, "cell", {"resume": "auto", **changes})
    assert ended.code == 2 and next(iter(changes)) in ended.err and "began with" in ended.err
    assert losses(cell) == before


def test_a_run_from_scratch_alone_is_resumed_by_its_path(place: Path, cell: Path) -> None:
    alone = {"upcycle_vs_cpt.arms": "scratch", "upcycle_vs_cpt.sunk_steps": "[4]"}
    assert run(place, "by-path", alone, StopAt("scratch", 3)).code == 130
    path = place / "outputs" / "by-path"
    ended = run(place, "by-path", alone | {"run.name": None, "resume": path})
    assert ended.code == 0, ended.err
    assert rows(path, "scratch") == rows(cell, "scratch")


def test_a_checkpoint_of_ones_own(place: Path, cell: Path) -> None:
    dense = json.loads((cell / "run.json").read_text())["identity"]["dense"]
    ended = run(place, "own", {"dense": dense, "upcycle_vs_cpt.sunk_steps": "[4]", "seed": 1, "data.seed": 0})
    assert ended.code == 0, ended.err
    found = losses(place / "outputs" / "own")
    assert found["dense"] == pytest.approx(losses(cell)["dense"])
    drawn = rows(place / "outputs" / "own", "scratch")[0]["val_loss"]
    assert drawn > found["dense"] and drawn != rows(cell, "scratch")[0]["val_loss"]
    assert weights(place / "outputs" / "own" / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.schedule.kind": "cosine"}, "optim.schedule.kind='cosine': shorter runs branch off"),
        ({"train.eval_every": 0}, "train.eval_every=0"),
        ({"train.steps": 0}, "there is nothing to compare"),
        ({"top_k_schedule": "[{until:0.5,top_k:4,layers:1}]"}, "FLOPs that do not change"),
        ({"upcycle": "cmoe", "router": "analytical"}, "has no dense model to look at"),
        ({"upcycle_vs_cpt.sunk_steps": "[-1]"}, "at least 0"),
    ],
)
def test_mistakes(place: Path, changes: dict[str, Any], message: str) -> None:
    ended = run(place, "wrong", changes)
    assert ended.code == 2 and message in ended.err, ended.err
    assert not (place / "outputs" / "wrong").exists()
