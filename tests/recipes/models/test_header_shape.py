"""The shape of the networks by headers is the shape that the loaded model has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe.upcycle.build_experts import ffn_shape
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.header_shape import read_ffn_shape
from tests.conftest import MakeCheckpoint, random_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "falcon", "gptj", "arcee"]
)
def test_shape_of_a_family(family: str, make_checkpoint: MakeCheckpoint) -> None:
    model = random_model(family)
    expected = ffn_shape(find_ffns(model, model.config)[0].weights)
    assert read_ffn_shape(make_checkpoint(family)) == expected


def test_shards_are_read_as_one(make_checkpoint: MakeCheckpoint) -> None:
    assert read_ffn_shape(make_checkpoint("llama", sharded=True)) == read_ffn_shape(make_checkpoint("llama"))


def test_what_is_not_known_is_left_to_the_surgery(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "dense"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 33}))
    assert read_ffn_shape(folder) is None
