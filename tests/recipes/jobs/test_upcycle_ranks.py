"""The job on two ranks under torchrun: as on one, stopped by real signals, and resumed to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import StopAt, job, process, rows, same_training, steps, summary

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RANKS = 2
# Sums in another order over six steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4


@pytest.fixture(scope="module")
def options(text: str, first: Path) -> dict[str, Any]:
    """Two micro-batches for each of two ranks; the embedded default is cached."""
    return {"data.path": text, "train.micro_batch_size": 1}


@pytest.fixture(scope="module")
def straight(workplace: Path, options: dict[str, Any]) -> Path:
    """An uninterrupted run on two ranks."""
    ended = process(workplace, options | {"run.name": "two"}, ranks=RANKS)
    assert ended.code == 0, ended.err
    return workplace / "outputs" / "two"


def alike(run_dir: Path, reference: Path, stages: tuple[str, ...] = ("moe", "cpt")) -> None:
    """Asserts that two runs differ by rounding alone."""
    for stage in stages:
        ours, theirs = rows(run_dir, stage), rows(reference, stage)
        assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
        for row, same in zip(ours, theirs, strict=True):
            for name in {"loss", "val_loss", "grad_norm"} & set(row):
                assert row[name] == pytest.approx(same[name], rel=ADAPTED), (stage, row["step"], name)


def test_two_ranks_do_what_one_does(straight: Path, first: Path) -> None:
    # One rank has one micro-batch and two have two each: the balance loss of the mixture is of a micro-batch.
    alike(straight, first, ("cpt",))
    ours, theirs = (summary(run_dir)["results"] for run_dir in (straight, first))
    for row, same in zip(ours, theirs, strict=True):
        assert row["total_params"] == same["total_params"] and row["tokens"] == same["tokens"]
        assert row["val_loss"] == pytest.approx(same["val_loss"], rel=1e-3)


def test_sigterm_to_torchrun(workplace: Path, options: dict[str, Any], straight: Path) -> None:
    stop_at = StopAt("moe", 2, "SIGTERM", "parent")
    stopped = process(workplace, options | {"run.name": "two-term"}, stop_at, ranks=RANKS, command=True)
    run_dir = workplace / "outputs" / "two-term"
    assert stopped.code != 0
    assert f"stopped and saved; go on with: resume={run_dir}" in stopped.out
    assert steps(run_dir / "checkpoints") == [2, 3]
    shutil.copytree(run_dir, workplace / "outputs" / "two-one")
    resumed = process(workplace, options | {"run.name": "two-term", "resume": "auto"}, ranks=RANKS)
    assert resumed.code == 0, resumed.err
    same_training(run_dir, straight)
    # The same checkpoint on one rank.
    alone = job(workplace, options | {"run.name": "two-one", "resume": "auto", "train.micro_batch_size": 2})
    assert alone.code == 0, alone.err
    assert "resuming on 1 ranks a checkpoint of 2 ranks" in alone.out
    alike(workplace / "outputs" / "two-one", straight)


def test_ctrl_c(workplace: Path, options: dict[str, Any]) -> None:
    stop_at = StopAt("cpt", 3, "SIGINT", "parent")
    stopped = process(workplace, options | {"run.name": "two-int"}, stop_at, ranks=RANKS)
    run_dir = workplace / "outputs" / "two-int"
    assert stopped.code != 0
    assert "stopped and saved" in stopped.out
    assert steps(run_dir / "cpt" / "checkpoints") == [2, 4]


def test_a_rank_that_is_killed_is_named(workplace: Path, options: dict[str, Any]) -> None:
    # As the system does where memory is short; torchrun itself, since ranks are told by how it starts them.
    changes = options | {"run.name": "two-kill", "compare.cpt": False}
    killed = process(workplace, changes, StopAt("moe", 3, "SIGKILL", "rank1"), ranks=RANKS, cold=True)
    assert killed.code == 1
    assert "error: rank 1 has ended without a word" in killed.err, killed.err
    assert "Set resume=auto" in killed.err
    ours = killed.err.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in ours and "gloo" not in ours, killed.err
    resumed = process(workplace, changes | {"resume": "auto"}, ranks=RANKS)
    assert resumed.code == 0, resumed.err
    assert "going on from" in resumed.out
