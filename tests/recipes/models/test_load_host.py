"""Checkpoints that transformers itself cannot make a whole model of are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe.errors import ModelError
from moe.routing.draws import seeded_generator
from recipes.models.hf.hf_model import load_model
from tests.conftest import MakeCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(make_checkpoint("llama"), tmp_path / "dense")


def edit_config(folder: Path, **values: object) -> None:
    """Changes ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_weights_are_counted_and_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    assert "2 weights are missing from its files, model.layers.1.mlp.up_proj.weight the first" in message
    assert "Download the checkpoint again." in message


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=64)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load_model(checkpoint)


def test_an_unknown_family_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="frobnicate")
    with pytest.raises(ModelError, match="transformers cannot use its config.json .*frobnicate"):
        load_model(checkpoint)


def test_generators_depend_on_all_that_they_are_for() -> None:
    keys = [(0, "router", 0), (0, "router", 1), (0, "experts", 0), (1, "router", 0)]
    seeds = [seeded_generator(seed, *where).initial_seed() for seed, *where in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [seeded_generator(seed, *where).initial_seed() for seed, *where in keys]
