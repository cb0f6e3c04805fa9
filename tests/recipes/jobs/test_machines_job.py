"""Two machines of two ranks each, under the script for Slurm: what they compute, and that one may die."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT, TESTS
from tests.patience import patience
from tests.recipes.jobs import job_runs, machines
from tests.recipes.jobs.job_runs import arguments, job, rows, same_training

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# Sums in another order over some steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4
_SLURM = TESTS / "recipes" / "jobs" / "slurm"


@pytest.fixture(scope="module")
def submit(workplace: Path, spread_options: dict[str, Any]) -> Callable[..., Path]:
    """Runs the job under the name given; what it leaves."""
    unsupported_reason = machines.unsupported_reason()
    if unsupported_reason is not None:
        pytest.skip(f"no machines can be made here: {unsupported_reason}")

    def run(name: str, **environment: str) -> Path:
        recipe, *overrides = arguments(workplace, spread_options | {"engine.expert_parallel": 2})
        assert recipe == "+recipe=upcycle"
        slurm = {
            "PATH": os.pathsep.join((str(_SLURM), str(Path(sys.executable).parent), os.environ["PATH"])),
            "JOB": job_runs.__file__,
            "SLURM_JOB_ID": name,
            "SLURM_JOB_NAME": name,
            "SLURM_JOB_NODELIST": "node-a,node-b",
            "SLURM_NNODES": "2",
            "RANKS_PER_NODE": "2",
        }
        command = ["bash", str(ROOT / "docs" / "upcycle.sbatch"), *overrides]
        done = machines.with_machines(command, patience(400), **slurm, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return workplace / "outputs" / name

    return run


@pytest.fixture(scope="module")
def undisturbed(submit: Callable[..., Path]) -> Path:
    """What the job leaves when nothing happens."""
    return submit("machines")


def test_two_machines_do_what_one_rank_does(
    workplace: Path, spread_options: dict[str, Any], undisturbed: Path
) -> None:
    alone = job(workplace, spread_options | {"run.name": "machines-alone"})
    assert alone.code == 0, alone.err
    found, wanted = rows(undisturbed, "moe"), rows(workplace / "outputs" / "machines-alone", "moe")
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, same in zip(found, wanted, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(row):
            assert row[name] == pytest.approx(same[name], rel=ADAPTED), (row["step"], name)


def test_a_machine_that_goes_down_and_comes_back(
    workplace: Path, undisturbed: Path, submit: Callable[..., Path]
) -> None:
    saved = workplace / "outputs" / "machines-lost" / "checkpoints" / "step-00000002"
    run_dir = submit("machines-lost", LOSE_MACHINE_AT=str(saved))
    same_training(run_dir, undisturbed, ("moe",))
    assert len(json.loads((run_dir / "run.json").read_text())["parts"]) == 2
