"""The whole job under megatron-core: its figures and its exported model are those of a native run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.jobs.job_runs import StopAt, job, process, rows, steps, summary, weights

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# fp32 sums in another order, seen through a few steps of AdamW.
ORDER = 1e-4


def test_megatron_from_start_to_export_over_three_layouts(workplace: Path, text: str, first: Path) -> None:
    # What the first run has trained: an embedded default is of the engine that trained it.
    (dense,) = (workplace / "cache").glob("dense-*/hf")
    changes: dict[str, Any] = {"data.path": text, "dense": dense, "compare.cpt": "false"}
    changes["train.micro_batch_size"] = 2
    run_dir, wanted_dir = workplace / "outputs" / "mcore", workplace / "outputs" / "mcore-native"
    native = job(workplace, changes | {"run.name": "mcore-native"})
    assert native.code == 0, native.err
    ours = changes | {"run.name": "mcore", "engine": "megatron"}
    stopped = job(workplace, ours, StopAt("moe", 1))
    assert stopped.code == 130, stopped.err
    ours |= {"resume": "auto"}
    spread = {"engine.tensor_parallel": 2, "engine.expert_parallel": 2, "engine.dispatcher": "allgather"}
    stopped = process(workplace, ours | spread, StopAt("moe", 3, "SIGTERM", "parent"), ranks=2)
    assert "stopped and saved" in stopped.out, stopped.err
    assert "experts=graft (Graft's stacked experts), dispatcher=allgather (" in stopped.out
    assert steps(run_dir / "checkpoints") == [2, 4]
    done = process(workplace, ours | {"engine.pipeline_parallel": 2}, ranks=2)
    assert done.code == 0, done.err
    _near(rows(run_dir, "moe"), rows(wanted_dir, "moe"))
    # Mixtral as transformers loads it, which the job has compared with what was trained.
    export = summary(run_dir)["export"]
    assert export["format"] == "mixtral" and export["relative"] < 1e-5, export
    wanted, found = weights(wanted_dir / "hf"), weights(run_dir / "hf")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], weight, atol=1e-3) for name, weight in wanted.items())


def _near(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    # What is read and met on a rank depends on how the ranks are laid out; shares of a peak on the clock.
    of_layout, of_bytes = ("touched", "mfu", "s_mfu"), {"step_bytes", "s_mbu", "router/experts_touched"}
    for ours, theirs in zip(found, wanted, strict=True):
        # Where matrices are cut bytes are not counted.
        assert ours.keys() <= theirs.keys() and theirs.keys() - ours.keys() <= of_bytes
        for key in ours:
            if key != "stage" and not any(part in key for part in of_layout):
                assert ours[key] == pytest.approx(theirs[key], rel=ORDER, abs=ORDER), key


def test_what_it_cannot_train_is_one_sentence(workplace: Path, text: str) -> None:
    options = {"engine": "megatron", "data.path": text}
    wrong = options | {"router": "soft_moe", "optim": "muon", "engine.tensor_parallel": 3}
    lacking = options | {"engine.experts": "te", "engine.dispatcher": "deepep"}
    said = {
        "router": ("experts see mixtures of tokens", "has AdamW alone", "4 attention heads do not divide"),
        "machine": (
            "TransformerEngine computes on GPUs",
            "kernels run on GPUs",
            "add bf16 alone",
            "nothing travels",
        ),
    }
    for changes, parts in ((wrong, said["router"]), (lacking, said["machine"])):
        done = job(workplace, changes)
        assert done.code == 2
        for part in parts:
            assert part in done.err, done.err
