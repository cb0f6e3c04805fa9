"""Calibration of a real decoder, and the job that runs it: against autograd, stopped, resumed, on two ranks.

Letters: B samples, S sequence length, D model width, F width of the dense network.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics.layer_statistics import LayerStatistics, Wanted
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import load_model
from recipes.upcycling.calibration.observe import Observer
from recipes.upcycling.calibration.statistics_files import (
    CalibrationFolder,
    Stored,
    read_stored,
    write_stored,
)
from tests.conftest import VOCABULARY, MakeCheckpoint
from tests.recipes.jobs.job_runs import Ended, job, process, rows, same_training, steps, weights, write_text

OPTIONS: dict[str, Any] = {
    "upcycle": "llama_moe",
    "upcycle.split": "gradient",
    "compare.cpt": False,
    "train.steps": 3,
    "train.save_every": 2,
    "optim.schedule.warmup_steps": 0,
    "calibration.samples": 10,
    "calibration.batch_size": 4,
}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradients_are_those_of_the_model(family: str, make_checkpoint: MakeCheckpoint) -> None:
    model = load_model(make_checkpoint(family))
    model.module.eval()
    tokens = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    sites = find_ffns(model.module, model.config)
    # By plain autograd: the input of every down projection keeps its gradient.
    hidden: dict[int, torch.Tensor] = {}
    down = {"llama": "down_proj", "gpt_neox": "dense_4h_to_h"}[family]

    def keep(layer: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            args[0].retain_grad()
            hidden[layer] = args[0]

        return hook

    handles = [
        model.module.get_submodule(f"{site.name}.{down}").register_forward_pre_hook(keep(site.layer))
        for site in sites
    ]
    logits = model.module(input_ids=tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    for handle in handles:
        handle.remove()
    model.module.zero_grad()
    layers = {
        s.layer: LayerStatistics(s.weights, Wanted(("importance_F", "inputs_TD")), Draws(0, s.layer))
        for s in sites
    }
    observer = Observer(model, sites, layers)
    for layer in layers.values():
        layer.begin(0)
    with observer.watching(True):
        for sample in range(3):  # one by one: the summed loss does not mind
            observer.show(tokens[sample : sample + 1], torch.tensor([8 * sample]), True)
    for site in sites:
        layers[site.layer].finish(0)
        grad = hidden[site.layer].grad
        assert grad is not None
        expected = (hidden[site.layer] * grad).detach().abs().double().flatten(0, 1).mean(0)
        torch.testing.assert_close(layers[site.layer].results["importance_F"], expected, rtol=1e-4, atol=1e-9)
        assert layers[site.layer].results["inputs_TD"].shape == (24, site.weights.model_width)
    # The model is as it was.
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    assert not model.module.training
    assert not any(module._forward_hooks for module in model.module.modules())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs and cache of the runs of this file."""
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def options(place: Path) -> dict[str, Any]:
    """Of all runs."""
    return OPTIONS | {"data.path": write_text(place / "text")}


@pytest.fixture(scope="module")
def straight(place: Path, options: dict[str, Any]) -> Path:
    """An uninterrupted run."""
    ended = job(place, options | {"run.name": "straight"})
    assert ended.code == 0, ended.err
    return place / "outputs" / "straight"


def statistics(run_dir: Path) -> dict[str, torch.Tensor]:
    """The finished statistics of a run."""
    stored = read_stored(CalibrationFolder.of_run(run_dir).statistics)
    assert stored is not None
    return dict(stored.tensors)


def stop_after(place: Path, options: dict[str, Any], batches: int) -> Ended:
    """Runs the job until so many batches of the calibration have been shown."""
    from recipes.upcycling.calibration.gather import Calibration

    plain, shown = Calibration._batch, []

    def counting(self: Calibration, *args: Any) -> None:
        plain(self, *args)
        shown.append(args)
        if len(shown) == batches:
            self.stop.requested = True

    with patch.object(Calibration, "_batch", counting):
        return job(place, options)


@pytest.mark.parametrize("batches", [3, 4])
def test_a_stopped_calibration_goes_on(
    batches: int, place: Path, options: dict[str, Any], straight: Path
) -> None:
    # Three batches a pass: at the end of the first, and within the second.
    name = f"stopped-{batches}"
    run_dir = place / "outputs" / name
    stopped = stop_after(place, options | {"run.name": name}, batches)
    assert stopped.code == 130, stopped.err
    assert f"stopped and saved; go on with: resume={run_dir}" in stopped.out
    folder = CalibrationFolder.of_run(run_dir)
    assert folder.state.is_file() and not folder.statistics.exists()
    resumed = job(place, options | {"resume": run_dir})
    assert resumed.code == 0, resumed.err
    assert f"going on from batch {(batches - 1) % 3 + 1} of pass {(batches - 1) // 3 + 1}" in resumed.out
    ours, theirs = statistics(run_dir), statistics(straight)
    assert ours.keys() == theirs.keys() == {"0/importance_EF", "1/importance_EF"}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert not folder.state.exists()
    same_training(run_dir, straight, ("moe",))


def test_a_run_that_trains_does_not_calibrate_again(
    place: Path, options: dict[str, Any], straight: Path
) -> None:
    run_dir = place / "outputs" / "longer"
    shutil.copytree(straight, run_dir)
    longer = options | {"train.steps": 5, "run.name": "longer", "resume": "auto"}
    with patch("recipes.jobs.moe_stage.Calibration", side_effect=AssertionError("calibrated again")):
        ended = job(place, longer)
    assert ended.code == 0, ended.err
    assert [row["step"] for row in rows(run_dir, "moe")] == [0, 1, 2, 3, 4, 5]
    # A run that begins at its checkpoint has statistics of its own.
    fork = options | {"run.name": "fork", "resume": run_dir / "checkpoints" / "step-00000005"}
    ended = job(place, fork | {"train.steps": 6})
    assert ended.code == 0, ended.err
    ours, theirs = statistics(place / "outputs" / "fork"), statistics(straight)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    # Without them the experts cannot be planned.
    CalibrationFolder.of_run(run_dir).statistics.unlink()
    ended = job(place, longer | {"train.steps": 6})
    assert ended.code == 2 and "planned by statistics, and their file is missing" in ended.err


def test_other_statistics_are_refused(place: Path, options: dict[str, Any], straight: Path) -> None:
    run_dir = place / "outputs" / "changed"
    stopped = stop_after(place, options | {"run.name": "changed"}, 2)
    assert stopped.code == 130, stopped.err
    ended = job(place, options | {"run.name": "changed", "resume": "auto", "calibration.samples": 12})
    assert ended.code == 2
    assert "calibration.samples=12" in ended.err and "was gathered with 10" in ended.err
    state = CalibrationFolder.of_run(run_dir).state
    state.write_bytes(state.read_bytes()[:100])
    ended = job(place, options | {"run.name": "changed", "resume": "auto"})
    assert ended.code == 2 and "it is damaged" in ended.err


def test_too_large_statistics_are_refused_by_name(place: Path, options: dict[str, Any]) -> None:
    given = options | {"upcycle.split": "coactivation", "calibration.max_gib": 1e-6, "run.name": "large"}
    ended = job(place, given)
    assert ended.code == 2
    assert "calibration.max_gib=1e-06" in ended.err and "most of it for coactivation_FF" in ended.err


def test_text_of_ones_own(place: Path, options: dict[str, Any], straight: Path) -> None:
    other = write_text(place / "other", seed=5)
    ended = job(place, options | {"run.name": "own", "calibration.path": other, "train.steps": 0})
    assert ended.code == 0, ended.err
    ours, theirs = statistics(place / "outputs" / "own"), statistics(straight)
    assert not torch.equal(ours["0/importance_EF"], theirs["0/importance_EF"])


@pytest.mark.parametrize(
    ("method", "router", "experts", "more"),
    [
        ("llama_moe_v2", "topk", 3, {"upcycle.layers": "all"}),
        ("cmoe", "analytical", 4, {}),
        ("snake", "one_plus", 4, {"upcycle.num_shared": 2}),
    ],
)
def test_methods_go_through_the_job(
    method: str, router: str, experts: int, more: dict[str, Any], place: Path, options: dict[str, Any]
) -> None:
    given = {name: value for name, value in options.items() if name != "upcycle.split"}
    given |= {"upcycle": method, "router": router, "upcycle.num_experts": experts, "run.name": method}
    ended = job(place, given | {"train.steps": 2} | more)
    assert ended.code == 0, ended.err
    assert "this method is not exact under this router" in ended.out
    assert steps(place / "outputs" / method / "checkpoints") == [2]
    assert weights(place / "outputs" / method / "hf")


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_gather_what_one_does(place: Path, options: dict[str, Any], straight: Path) -> None:
    ended = process(place, options | {"run.name": "ranks", "train.steps": 0}, ranks=2)
    assert ended.code == 0, ended.err
    ours, theirs = statistics(place / "outputs" / "ranks"), statistics(straight)
    for key, value in theirs.items():
        # fp32 products of other shapes.
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-9, msg=key)


def test_files_keep_what_they_are_given(tmp_path: Path) -> None:
    tensors = {"0/a": torch.arange(6).view(2, 3).t(), "11/b": torch.tensor(3, dtype=torch.int64)}
    write_stored(tmp_path / "deep" / "file", Stored(tensors, {"seed": 3}, (1, 7)))
    found = read_stored(tmp_path / "deep" / "file")
    assert found is not None and (found.identity, found.place) == ({"seed": 3}, (1, 7))
    assert torch.equal(found.layer(0)["a"], tensors["0/a"]) and set(found.by_layer()) == {0, 11}
    assert read_stored(tmp_path / "nothing") is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_text_that_is_not_there_is_told_at_once(place: Path, options: dict[str, Any]) -> None:
    ended = job(place, options | {"run.name": "nowhere", "calibration.path": "/nowhere.txt"})
    assert ended.code == 2 and "calibration.path='/nowhere.txt': does not exist" in ended.err
    assert not (place / "outputs" / "nowhere").exists()
