"""The job with low-rank factors: experts spread over two ranks, gone on with on one, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.checkpoint import find_checkpoint
from recipes.checkpoint.reader import open_checkpoint
from recipes.jobs.export_run import ExportRequest, export_run
from tests.recipes.jobs.job_runs import job, process, rows, summary

# Sums in another order over some steps of AdamW, which divides small gradients by themselves.
ADAPTED = 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_from_start_to_export_and_on_with_one_rank(workplace: Path, text: str, first: Path) -> None:
    (dense,) = (workplace / "cache").glob("dense-*/hf")
    options: dict[str, Any] = {
        "dense": dense,
        "data.path": text,
        "experts.lora.rank": 8,
        "router.balance_coef": 0.0,
        "train.micro_batch_size": 1,
        "train.eval_every": 2,
        "optim.schedule.kind": "constant",
        "compare.cpt": False,
    }
    alone = job(workplace, options | {"run.name": "lora-alone"})
    assert alone.code == 0, alone.err
    named = options | {"run.name": "lora-spread"}
    spread = process(workplace, named | {"train.steps": 4, "engine.expert_parallel": 2}, ranks=2)
    assert spread.code == 0, spread.err
    run_dir = workplace / "outputs" / "lora-spread"
    changed = job(workplace, named | {"train.steps": 6, "resume": "auto", "experts.lora.alpha": 4})
    assert changed.code == 2 and "experts.lora.alpha=4.0: the run in" in changed.err
    more = job(workplace, named | {"train.steps": 6, "resume": "auto"})
    assert more.code == 0, more.err
    wanted, found = rows(workplace / "outputs" / "lora-alone", "moe"), rows(run_dir, "moe")
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, same in zip(found, wanted, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(row):
            assert row[name] == pytest.approx(same[name], rel=ADAPTED), (row["step"], name)
    _check_export(run_dir, workplace)


def _check_export(run_dir: Path, workplace: Path) -> None:
    """The weights themselves have not moved, and what is exported is them and the factors."""
    assert summary(run_dir)["export"]["relative"] < ADAPTED
    again = export_run(ExportRequest(run_dir, dtype=torch.float32), workplace / "lora-exported")
    ours, theirs = (load_file(f / "model.safetensors") for f in (run_dir / "hf", again.path))
    assert set(ours) == set(theirs) and not [name for name in ours if "lora" in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    path = find_checkpoint(run_dir / "checkpoints").path
    assert path is not None
    with open_checkpoint(path) as tensors:
        state = {name.rpartition(".")[0] for name in tensors.names("optim.")}
        experts = [name for name in tensors.names("model.") if ".experts." in name]
        site = "model.layers.0.mlp.experts"
        w_down, low_a, low_b = (
            tensors.read(f"model.{site}.{name}")
            for name in ("w_down_EDF", "lora_a_down_ErF", "lora_b_down_EDr")
        )
    assert {name for name in experts if name in state} == {name for name in experts if "lora" in name}
    assert all(torch.equal(w_down[e], w_down[0]) for e in range(len(w_down)))  # copies still
    assert low_b.any() and not torch.equal(low_a[0], low_a[1])
    exported = next(
        t for name, t in ours.items() if "layers.0." in name and name.endswith("experts.1.w2.weight")
    )
    torch.testing.assert_close(exported, w_down[1] + 16 / 8 * low_b[1] @ low_a[1], rtol=1e-6, atol=1e-7)
