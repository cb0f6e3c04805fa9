"""Runs as systems: the exported mixture, the dense model it began with, and that model trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe.errors import ConfigError, Mistake
from recipes.cap.folders import Source, find_source
from recipes.cap.loading import load_system, shape_of
from recipes.cap.request import name_systems
from tests.recipes.cap.cap_systems import CPU, some_ids
from tests.recipes.jobs.job_runs import job, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of the main job, with its dense baseline."""
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "text")
    done = job(folder, {"data.path": text, "run.name": "a", "compare.cpt": "true", "train.steps": 3})
    assert done.code == 0, done.err
    return folder / "outputs" / "a"


def source(folder: Path) -> Source:
    found = find_source(folder)
    assert isinstance(found, Source), found
    return found


def test_a_run_is_its_exported_mixture(run: Path) -> None:
    assert source(run) == Source(run, run / "hf")
    system = load_system("moe", source(run), CPU)
    assert len(system.sites) == 2 and system.shape is not None and system.shape_reason is None


def test_the_dense_models_of_a_run(run: Path) -> None:
    dense, trained = (load_system("x", source(run / stage), CPU) for stage in ("dense", "cpt"))
    assert dense.sites == trained.sites == () and dense.source.folder == trained.source.folder
    ids = some_ids(1, 6)
    with torch.no_grad():
        before, after = (one.model(input_ids=ids).logits for one in (dense, trained))
    assert not torch.equal(before, after), "three steps have changed it"
    files = json.loads((trained.source.trained / "manifest.json").read_text())  # type: ignore[operator]
    assert files["step"] == 3


def test_a_run_without_the_baseline(run: Path) -> None:
    (run / "cpt").rename(run / "hidden")
    try:
        found = find_source(run / "cpt")
    finally:
        (run / "hidden").rename(run / "cpt")
    assert isinstance(found, Mistake) and "no complete checkpoint" in found.rule
    assert "compare.cpt=true" in found.remedy


def test_names(run: Path) -> None:
    given = (str(run), f"mine={run}", str(run / "cpt"))
    assert [name for name, _ in name_systems(given)] == ["a", "mine", "cpt"]


def test_weights_that_do_not_fit_their_config_are_refused(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    folder.mkdir()
    for path in (run / "hf").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(ConfigError, match="a token cannot use more experts than the 4"):
        load_system("x", Source(folder, folder), CPU)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_system("x", Source(folder, folder), CPU).shape is not None


def test_exports_of_families_that_no_accounting_knows_are_measured_all_the_same() -> None:
    for config in (
        {"model_type": "gpt2"},
        {"model_type": "graft_moe", "dense_config": {"model_type": "gpt2"}},
    ):
        assert shape_of(config) == (None, "no accounting knows the family 'gpt2'")
