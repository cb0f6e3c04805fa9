"""The job under torchrun with experts, and heads, spread over two ranks, and gone on with on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import job, process, rows, summary

# Sums in another order over some steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4
LAYOUTS = {
    "native": {},
    "native-heads": {"engine.tensor_parallel": 2},
    "deepspeed": {"engine": "deepspeed", "engine.zero_stage": 3},
}


@pytest.fixture(scope="module")
def options(spread_options: dict[str, Any]) -> dict[str, Any]:
    """That can be gone on with after any step."""
    return spread_options | {"train.eval_every": 2, "optim.schedule.kind": "constant"}


@pytest.fixture(scope="module")
def alone(workplace: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one rank."""
    ended = job(workplace, options | {"run.name": "spread-alone"})
    assert ended.code == 0, ended.err
    return rows(workplace / "outputs" / "spread-alone", "moe")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_start_to_export_and_on_with_one_rank(
    layout: str, workplace: Path, options: dict[str, Any], alone: list[dict[str, Any]]
) -> None:
    named = options | {"run.name": f"spread-{layout}"}
    changes = named | LAYOUTS[layout] | {"train.steps": 4, "engine.expert_parallel": 2}
    spread = process(workplace, changes, ranks=2)
    assert spread.code == 0, spread.err
    run_dir = workplace / "outputs" / f"spread-{layout}"
    # Reloaded by transformers, the exported model says what the spread one says.
    assert summary(run_dir)["export"]["relative"] < ADAPTED
    more = job(workplace, named | {"train.steps": 6, "resume": "auto"})
    assert more.code == 0, more.err
    assert "resuming on 1 ranks a checkpoint of 2 ranks" in more.out
    found = rows(run_dir, "moe")
    assert [row["step"] for row in found] == [row["step"] for row in alone]
    for row, same in zip(found, alone, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(row):
            assert row[name] == pytest.approx(same[name], rel=ADAPTED), (row["step"], name)


def test_experts_that_do_not_divide_are_told_before_anything_starts(workplace: Path, text: str) -> None:
    ended = job(workplace, {"data.path": text, "engine.expert_parallel": 3, "run.name": "ep-uneven"})
    assert ended.code == 2
    assert "engine.expert_parallel=3: the 4 experts of upcycle.num_experts do not divide" in ended.err
    assert "1 ranks do not divide into groups of 3" in ended.err
    assert not (workplace / "outputs" / "ep-uneven").exists()


def test_what_deepspeed_cannot_do_is_told_before_anything_starts(workplace: Path, text: str) -> None:
    changes = {"data.path": text, "engine": "deepspeed", "optim": "muon", "run.name": "ds-muon"}
    ended = job(workplace, changes | {"engine.expert_parallel": 3})
    assert ended.code == 2
    assert "optim.name='muon': engine=deepspeed splits matrices over the ranks" in ended.err
    assert "engine.expert_parallel=3: the 4 experts of upcycle.num_experts do not divide" in ended.err
    wrong = job(workplace, {"data.path": text, "engine": "deepspeed", "engine.zero_stage": 4})
    assert wrong.code == 2 and "engine.zero_stage=4" in wrong.err
    assert not (workplace / "outputs" / "ds-muon").exists()
