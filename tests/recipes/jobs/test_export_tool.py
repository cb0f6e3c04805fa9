"""``python -m tools.export``: any checkpoint of a run as a model for others."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tools.export
from moe.errors import CheckpointError, ConfigError, ExactnessError
from recipes.checkpoint.reader import open_checkpoint
from recipes.models.export.mixtral import MixtralExporter
from tests.recipes.jobs.job_runs import job, summary

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
    said = capsys.readouterr().out
    assert "as mixtral, exact in transformers" in said
    assert "reloaded, its logits differ from the checkpoint's by" in said and "tokens in samples of" in said
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


def test_a_config_that_was_changed_since_is_refused(first: Path, tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(first, tmp_path / "changed"))
    whole = (run / "config.yaml").read_text()
    # Other functions of the same weights, to which an export would be true.
    for then, now in (("renormalise: true", "renormalise: false"), ("layers: all", "layers: every:2")):
        assert whole.count(then) == 1
        (run / "config.yaml").write_text(whole.replace(then, now))
        with pytest.raises(ConfigError, match="config.yaml has it, and the run began with"):
            call(run, "--out", tmp_path / "hf")
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


@pytest.fixture(scope="module")
def timid(workplace: Path, text: str, first: Path) -> Path:
    """A run from weights in bf16, whose steps are smaller than what bf16 tells apart."""
    dense = Path(json.loads((first / "run.json").read_text())["identity"]["dense"])
    half = workplace / "half"
    shutil.copytree(dense, half)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    config = json.loads((half / "config.json").read_text()) | {"dtype": "bfloat16"}
    (half / "config.json").write_text(json.dumps(config))
    options = {"data.path": text, "compare.cpt": True, "dense": half, "optim.lr": 1e-6, "train.steps": 3}
    ended = job(workplace, options | {"run.name": "timid"})
    assert ended.code == 0, ended.err
    assert "most of what was trained is lost" in ended.out
    return workplace / "outputs" / "timid"


def test_what_rounding_leaves_is_counted(
    timid: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    told = summary(timid)["export"]["rounding"]
    assert call(timid, "--out", tmp_path / "bf16", "--json", tmp_path / "bf16.json") == 0
    said = capsys.readouterr().out
    assert "exact" not in said and "most of what was trained is lost" in said
    assert "--dtype fp32 keeps what was trained" in said
    found = json.loads((tmp_path / "bf16.json").read_text())["check"]
    assert found["logits"]["max_diff"] <= 1e-4 * found["logits"]["max_logit"]
    assert found["rounding"]["survival"] == told["survival"]
    # By hand: copies of the dense weights, and the trained ones as fp32 files hold them.
    assert call(timid, "--out", tmp_path / "fp32", "--dtype", "fp32", "--json", tmp_path / "fp32.json") == 0
    assert "exact in transformers" in capsys.readouterr().out
    assert json.loads((tmp_path / "fp32.json").read_text())["check"]["rounding"] is None
    start = load_file(timid.parents[1] / "half" / "model.safetensors")
    matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    changed = survived = 0
    for name, trained in load_file(tmp_path / "fp32" / "model.safetensors").items():
        if name.endswith(".gate.weight"):
            continue  # its start is drawn
        layer, _, leaf = name.partition(".block_sparse_moe.experts.")
        origin = f"{layer}.mlp.{matrices[leaf.split('.')[1]]}.weight" if leaf else name
        moved = trained != start[origin].float()
        changed += int(moved.sum())
        survived += int((moved & (trained.bfloat16() != start[origin])).sum())
    routers = 2 * 4 * 32
    assert 0 <= told["survival"]["changed"] - changed <= routers
    assert abs(told["survival"]["survived"] * told["survival"]["changed"] - survived) <= routers
    assert survived < changed / 2


def test_the_dense_weights_may_be_gone(
    timid: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = timid.parents[1] / "half" / "model.safetensors"
    weights.rename(tmp_path / "away")
    try:
        assert call(timid, "--out", tmp_path / "hf") == 0
    finally:
        (tmp_path / "away").rename(weights)
    said = capsys.readouterr().out
    assert "the dense model cannot be read any more" in said and "expert choices change" in said


def test_the_dense_stage_is_checked_alike(
    timid: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(timid, "--stage", "cpt", "--out", tmp_path / "cpt") == 0
    assert "most of what was trained is lost" in capsys.readouterr().out


def test_files_that_compute_something_else_get_no_name(
    first: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MixtralExporter.expert_name
    monkeypatch.setattr(
        MixtralExporter,
        "expert_name",
        lambda self, moe, expert, matrix, bias: plain(self, moe, (expert + 1) % 4, matrix, bias),
    )
    with pytest.raises(ExactnessError, match="does not compute what was trained"):
        call(first, "--out", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
