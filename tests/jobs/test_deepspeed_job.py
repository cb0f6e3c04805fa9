"""The job under torchrun on DeepSpeed, with ZeRO-3 and spread experts, gone on with on the native engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs.job_runs import job, process, rows, summary

# Sums in another order over some steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_deepspeed_from_start_to_export_and_on_with_torch(workplace: Path, text: str, first: Path) -> None:
    # What the first run has trained: an embedded default is of the engine that trained it.
    (dense,) = (workplace / "cache").glob("dense-*/hf")
    # Without losses of a micro-batch it does not show how a batch is cut.
    options: dict[str, Any] = {
        "dense": dense,
        "data.path": text,
        "router.balance_coef": 0.0,
        "train.micro_batch_size": 1,
        "train.eval_every": 2,
        "optim.schedule.kind": "constant",
        "compare.cpt": False,
    }
    alone = job(workplace, options | {"run.name": "ds-alone"})
    assert alone.code == 0, alone.err
    changes = options | {"run.name": "ds-two", "train.steps": 4, "engine": "deepspeed"}
    ours = process(workplace, changes | {"engine.zero_stage": 3, "engine.expert_parallel": 2}, ranks=2)
    assert ours.code == 0, ours.err
    run_dir = workplace / "outputs" / "ds-two"
    # Reloaded by transformers, the exported model says what the spread one says.
    assert summary(run_dir)["export"]["relative"] < ADAPTED
    more = job(workplace, options | {"run.name": "ds-two", "train.steps": 6, "resume": "auto"})
    assert more.code == 0, more.err
    assert "resuming on 1 ranks what 2 ranks saved" in more.out
    found, wanted = rows(run_dir, "moe"), rows(workplace / "outputs" / "ds-alone", "moe")
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, same in zip(found, wanted, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(row):
            assert row[name] == pytest.approx(same[name], rel=ADAPTED), (row["step"], name)


def test_what_it_cannot_do_is_told_before_anything_starts(workplace: Path, text: str) -> None:
    options = {"data.path": text, "engine": "deepspeed", "optim": "muon", "run.name": "ds-muon"}
    ended = job(workplace, options | {"engine.expert_parallel": 3})
    assert ended.code == 2
    assert "optim.name='muon': engine=deepspeed cuts matrices over the ranks" in ended.err
    assert "engine.expert_parallel=3: the 4 experts of upcycle.num_experts do not divide" in ended.err
    wrong = job(workplace, {"data.path": text, "engine": "deepspeed", "engine.zero_stage": 4})
    assert wrong.code == 2 and "engine.zero_stage=4" in wrong.err
    assert not (workplace / "outputs" / "ds-muon").exists()
