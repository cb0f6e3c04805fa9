"""A run whose lower layer uses more experts at first: figures, resume across the change, export, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import StopAt, job, process, rows, same_training, summary, write_text

pytestmark = pytest.mark.slow

# Six steps of 4 samples of 16 tokens, in two micro-batches: layer 0 uses all 4 experts in three, then 2.
PHASES = "[{until:0.5,top_k:4,layers:1}]"
CHANGE = 3
# An expert of the tiny model: three matrices of 32 x 48.
EXPERT = 3 * 32 * 48


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every run here; ``folder`` is where they are."""
    folder = tmp_path_factory.mktemp("top_k_schedule")
    return {
        "folder": folder,
        "data.path": write_text(folder / "text"),
        "top_k_schedule": PHASES,
        "train.micro_batch_size": 2,
        "compare.cpt": False,
    }


def run(options: dict[str, Any], name: str, stop_at: StopAt | None = None, **changes: Any) -> Any:
    """Runs under a name."""
    given = {key: value for key, value in options.items() if key != "folder"}
    given |= {"run.name": name} | {key.replace("__", "."): value for key, value in changes.items()}
    return job(options["folder"], given, stop_at)


@pytest.fixture(scope="module")
def straight(options: dict[str, Any]) -> Path:
    """An uninterrupted run."""
    ended = run(options, "straight")
    assert ended.code == 0, ended.err
    assert "from step 0 on [4, 2] experts a token, layer by layer, " in ended.out
    assert f"from step {CHANGE} on [2, 2] experts a token, layer by layer, " in ended.out
    return options["folder"] / "outputs" / "straight"


def test_every_figure_is_of_the_step(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if row["stage"] == "moe" and row["step"] > 0]
    assert [row["layer/00/experts_per_token"] for row in steps] == [4, 4, 4, 2, 2, 2]
    assert [row["layer/01/experts_per_token"] for row in steps] == [2] * 6
    active = [row["active_params"] for row in steps]
    assert active[:CHANGE] == [active[-1] + 2 * EXPERT] * CHANGE and active[CHANGE:] == [active[-1]] * 3
    flops = [row["flops_per_token"] for row in steps]
    # Forward and backward: three products of two FLOPs for each weight of two experts.
    assert [value - flops[-1] for value in flops] == [6 * 2 * EXPERT] * CHANGE + [0] * 3
    for row in steps:  # the peak of these tests is 1e10
        assert row["mfu"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"] / 1e10)


def test_results_and_export_are_of_the_end(straight: Path) -> None:
    found = summary(straight)
    _, moe = found["results"]
    phases = found["top_k_schedule"]
    assert [(phase["first_step"], phase["top_k"]) for phase in phases] == [(0, [4, 2]), (CHANGE, [2, 2])]
    assert phases[1]["active_params"] == moe["active_params"] == phases[0]["active_params"] - 2 * EXPERT
    assert found["export"]["format"] == "mixtral" and found["export"]["relative"] < 1e-4
    assert json.loads((straight / "hf" / "config.json").read_text())["num_experts_per_tok"] == 2


@pytest.mark.parametrize("last", [CHANGE - 1, CHANGE])
def test_a_resume_across_the_change_is_exact(last: int, options: dict[str, Any], straight: Path) -> None:
    # The step after the row at which the signal comes is the last one that the first process does.
    name = f"stopped-{last}"
    assert run(options, name, StopAt("moe", last - 1)).code == 130
    resumed = run(options, name, resume="auto")
    assert resumed.code == 0, resumed.err
    same_training(options["folder"] / "outputs" / name, straight, ("moe",))


def test_a_change_cannot_be_moved_by_more_steps(options: dict[str, Any], straight: Path) -> None:
    assert run(options, "extended", StopAt("moe", 4)).code == 130
    refused = run(options, "extended", resume="auto", train__steps=8)
    assert refused.code == 2
    assert (
        "top_k_schedule=[{'until_step': 4, " in refused.err
        and "began with [{'until_step': 3, " in refused.err
    )
    # Tokens say the same in a run of any length: 3 steps of 64.
    tokens = PHASES.replace("0.5", "192")
    resumed = run(options, "extended", resume="auto", train__steps=8, top_k_schedule=tokens)
    assert resumed.code == 0, resumed.err
    assert [
        row["layer/00/experts_per_token"]
        for row in rows(options["folder"] / "outputs" / "extended", "moe")[1:]
    ] == [
        4,
        4,
        4,
        *[2] * 5,
    ]


@pytest.mark.distributed
def test_two_ranks_do_what_one_does(options: dict[str, Any], straight: Path) -> None:
    given = {key: value for key, value in options.items() if key != "folder"}
    given |= {"train.micro_batch_size": 1, "run.name": "two"}
    ended = process(options["folder"], given, ranks=2)
    assert ended.code == 0, ended.err
    ours, theirs = rows(options["folder"] / "outputs" / "two", "moe"), rows(straight, "moe")
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for row, same in zip(ours, theirs, strict=True):
        for name in {"loss", "val_loss", "grad_norm", "active_params", "layer/00/experts_per_token"} & set(
            row
        ):
            # Sums in another order over six steps of AdamW, which divides small gradients by themselves.
            assert row[name] == pytest.approx(same[name], rel=1e-4), (row["step"], name)
