"""Copies that begin with the optimizer state of the dense model's own training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.checkpoint.reader import CheckpointTensors, open_checkpoint
from recipes.jobs.export_run import ExportRequest, export_run
from tests.recipes.jobs.job_runs import job

OPTIONS = {"compare.cpt": "false", "upcycle.layers": "last:1"}


@pytest.fixture(scope="module")
def trained(first: Path) -> Path:
    """The last checkpoint of the dense model of the first run."""
    return sorted((first / "cpt" / "checkpoints").glob("step-*"))[-1]


@pytest.fixture(scope="module")
def dense(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as a folder."""
    out = tmp_path_factory.mktemp("dense") / "cpt"
    export_run(ExportRequest(run=first, stage="cpt"), out)
    return out


def state(tensors: CheckpointTensors, name: str, key: str) -> torch.Tensor:
    return tensors.read(f"optim.{name}.{key}")


def test_every_expert_has_the_moments_of_its_network(
    workplace: Path, text: str, dense: Path, trained: Path
) -> None:
    options = OPTIONS | {"data.path": text, "dense": dense, "run.name": "moments"}
    options |= {"optim.start_from": trained, "train.steps": 0, "optim.schedule.warmup_steps": 0}
    ended = job(workplace, options)
    assert ended.code == 0, ended.err
    assert "optimizer state of step" in ended.out
    # No step is taken, so that no checkpoint is left: the state is looked at one step later, at a rate of 0.
    options |= {"train.steps": 1, "optim.lr": 0.0, "run.name": "moments-kept"}
    assert job(workplace, options).code == 0
    (kept,) = (workplace / "outputs" / "moments-kept" / "checkpoints").glob("step-*")
    with open_checkpoint(trained) as before, open_checkpoint(kept) as after:
        steps = float(state(before, "model.norm.weight", "step"))
        site = "model.layers.1.mlp"
        assert float(state(after, "model.norm.weight", "step")) == steps + 1
        assert float(state(after, f"{site}.experts.w_up_EUD", "step")) == steps + 1
        assert float(state(after, f"{site}.router.weight_ED", "step")) == 1
        # v is 0.95 of what it was and a square: at least that, for every expert.
        gate, up, down = (
            state(before, f"{site}.{m}_proj.weight", "exp_avg_sq") for m in ("gate", "up", "down")
        )
        for expert in state(after, f"{site}.experts.w_up_EUD", "exp_avg_sq"):
            assert (expert >= 0.95 * torch.cat([gate, up]) * (1 - 1e-6)).all()
        for expert in state(after, f"{site}.experts.w_down_EDF", "exp_avg_sq"):
            assert (expert >= 0.95 * down * (1 - 1e-6)).all()
        # An expert whose tokens changed little keeps the direction of m.
        moment = torch.cat([state(before, f"{site}.{m}_proj.weight", "exp_avg") for m in ("gate", "up")])
        for expert in state(after, f"{site}.experts.w_up_EUD", "exp_avg"):
            assert torch.cosine_similarity(expert.flatten(), moment.flatten(), dim=0) > 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"upcycle": "drop"}, "only plain copies"),
        ({"upcycle.noise_std": 0.1}, "only plain copies"),
        ({"dense": None}, "dense names none"),
        ({"optim.start_from": "/nowhere/step-1"}, "there is no such checkpoint folder"),
    ],
)
def test_mistakes_are_told_at_once(
    workplace: Path, text: str, dense: Path, trained: Path, changes: dict[str, object], said: str
) -> None:
    options = OPTIONS | {"data.path": text, "dense": dense, "optim.start_from": trained, "run.name": None}
    ended = job(workplace, options | changes)
    assert ended.code == 2 and said in ended.err


def test_the_state_of_another_model_is_refused(
    workplace: Path, text: str, first: Path, trained: Path
) -> None:
    import json

    other = json.loads((first / "run.json").read_text())["identity"]["dense"]
    options = OPTIONS | {"data.path": text, "dense": other, "optim.start_from": trained, "run.name": "other"}
    ended = job(workplace, options)
    assert ended.code == 2 and "is not that of the dense model" in ended.err
