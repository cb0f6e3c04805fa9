"""``python -m tools.export``: any checkpoint of a run as a model for others."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tools.export
from moe.errors import CheckpointError, ConfigError
from recipes.checkpoint.reader import open_checkpoint

Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command with a command line."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        return tools.export.main()

    return run


def test_the_export_of_a_run_is_the_run_s_own(
    first: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(first, "--out", tmp_path / "hf") == 0
    assert "as mixtral, exact in transformers" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", first / "hf"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    config = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", first / "hf")]
    assert config[0] == config[1]
    call(first, "--out", tmp_path / "half", "--dtype", "bf16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_an_export_is_refused_by_name(first: Path, tmp_path: Path, call: Call) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.yaml in it"):
        call(tmp_path, "--out", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--step=999: .* holds step-"):
        call(first, "--out", tmp_path / "hf", "--step", 999)
    with pytest.raises(ConfigError, match="it exists already"):
        call(first, "--out", tmp_path)
    damaged = Path(shutil.copytree(first, tmp_path / "damaged"))
    newest = sorted((damaged / "checkpoints").glob("step-*"))[-1]
    data = bytearray((newest / "rank-00000.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "rank-00000.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError):
        call(damaged, "--out", tmp_path / "hf", "--step", int(newest.name[5:]))
    assert not (tmp_path / "hf").exists()


def test_the_dense_model_that_was_trained_on(first: Path, tmp_path: Path, call: Call) -> None:
    from transformers import AutoModelForCausalLM

    assert call(first, "--stage", "cpt", "--out", tmp_path / "cpt") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cpt")
    newest = sorted((first / "cpt" / "checkpoints").glob("step-*"))[-1]
    with open_checkpoint(newest) as tensors:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, tensors.read(f"model.{name}")), name
    begun = json.loads((first / "run.json").read_text())["identity"]["dense"]
    start = AutoModelForCausalLM.from_pretrained(begun)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert (tmp_path / "cpt" / "tokenizer.json").is_file()
