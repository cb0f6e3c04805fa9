"""What a run writes of its use of the hardware: rows, summary and report, and when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.runtime.run_file import read_run_file
from tests.recipes.jobs.job_runs import StopAt, job, summary

# Takes half of the tokens: MFU counts one expert each, S-MFU those that computed.
DROPS = {"router": "mod", "compare.cpt": False}


@pytest.fixture(scope="module")
def run_dir(workplace: Path, text: str, first: Path) -> Path:
    """Stopped after four of six steps, and gone on with."""
    options = DROPS | {"data.path": text, "run.name": "figures"}
    assert job(workplace, options, StopAt("moe", 3)).code == 130
    folder = workplace / "outputs" / "figures"
    assert 0 < summary(folder)["goodput"]["goodput"] < 1
    resumed = job(workplace, options | {"resume": "auto"}, full=True)
    assert resumed.code == 0, resumed.err
    return folder


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Of the steps, with the times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["stage"] == "moe" and row["step"] > 0]


def test_slots_that_are_not_used_lower_s_mfu(run_dir: Path) -> None:
    for row in rows(run_dir):
        used = row["router/experts_per_token"]
        assert used < 1 and row["flops_per_token_used"] < row["flops_per_token"]
        assert row["s_mfu"] / row["mfu"] == pytest.approx(
            row["flops_per_token_used"] / row["flops_per_token"]
        )
        # Forward and backward through the weights of the experts of two layers: three matrices of 32 x 48.
        less = 6 * (1 - used) * 2 * 3 * 32 * 48
        assert row["flops_per_token"] - row["flops_per_token_used"] == pytest.approx(less)
        assert 0 < row["s_mbu"] < 1 and row["goodput"] < 1


def test_goodput_is_of_the_whole_run(run_dir: Path) -> None:
    found, parts = summary(run_dir)["goodput"], read_run_file(run_dir)["parts"]
    steps = sum(row["step_s"] for row in rows(run_dir))
    assert found["processes"] == len(parts) == 2 and all(part["ended"] > part["started"] for part in parts)
    assert found["steps_s"] == pytest.approx(steps) and found["lost_steps_s"] == pytest.approx(0, abs=1e-6)
    assert found["goodput"] == pytest.approx(steps / found["wall_s"])
    assert found["evaluation_s"] > 0 and found["saving_s"] > 0
    said = sum(part["evaluation"] for part in parts)
    assert found["evaluation_s"] == pytest.approx(said)


def test_the_summary_has_the_stage_with_reasons(run_dir: Path) -> None:
    moe = summary(run_dir)["training"]["moe"]
    assert 0 < moe["s_mfu"] < moe["mfu"] and 0 < moe["s_mbu"] < 1 and moe["tokens_per_s"] > 0
    for name in ("memory_bytes", "energy_j"):
        assert (moe[name] is None) == (name in moe["missing"])
    energy = summary(run_dir)["energy"]
    assert energy["kwh"] is None and energy["reason"] or energy["kwh"] > 0
    peaks = summary(run_dir)["peaks"]
    assert peaks["flops"]["value"] > 0 and peaks["bytes_per_s"]["source"].startswith("measured")


def test_the_report_shows_them(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    for words in (
        "Use of the hardware",
        "S-MFU",
        "S-MBU",
        "goodput: steps that count",
        "peak of S-MBU, a rank",
    ):
        assert words in page, words
    moe = summary(run_dir)["training"]["moe"]
    for reason in moe["missing"].values():
        assert reason in page
