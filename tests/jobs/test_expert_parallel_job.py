"""The job under torchrun with experts spread over two ranks, and gone on with on one that holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs.job_runs import job, process, rows, summary

# Sums in another order over some steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_spread_experts_from_start_to_export_and_on(workplace: Path, text: str, first: Path) -> None:
    # Without losses of a micro-batch it does not show how a batch is cut.
    options: dict[str, Any] = {
        "data.path": text,
        "router.balance_coef": 0.0,
        "train.micro_batch_size": 1,
        "train.eval_every": 2,
        "optim.schedule.kind": "constant",
        "compare.cpt": False,
    }
    alone = job(workplace, options | {"run.name": "ep-alone"})
    assert alone.code == 0, alone.err
    changes = options | {"run.name": "ep-two", "train.steps": 4}
    spread = process(workplace, changes | {"engine.expert_parallel": 2}, ranks=2)
    assert spread.code == 0, spread.err
    run_dir = workplace / "outputs" / "ep-two"
    # Reloaded by transformers, the exported model says what the spread one says.
    assert summary(run_dir)["export"]["relative"] < ADAPTED
    more = job(workplace, options | {"run.name": "ep-two", "train.steps": 6, "resume": "auto"})
    assert more.code == 0, more.err
    assert "resuming on 1 ranks what 2 ranks saved" in more.out
    ours, theirs = rows(run_dir, "moe"), rows(workplace / "outputs" / "ep-alone", "moe")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, same in zip(ours, theirs, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(row):
            assert row[name] == pytest.approx(same[name], rel=ADAPTED), (row["step"], name)


def test_experts_that_do_not_divide_are_told_before_anything_starts(workplace: Path, text: str) -> None:
    options = {"data.path": text, "engine.expert_parallel": 3, "run.name": "ep-uneven"}
    ended = job(workplace, options)
    assert ended.code == 2
    assert "engine.expert_parallel=3: the 4 experts of upcycle.num_experts do not divide" in ended.err
    assert "1 ranks do not divide into groups of so many" in ended.err
    assert not (workplace / "outputs" / "ep-uneven").exists()
