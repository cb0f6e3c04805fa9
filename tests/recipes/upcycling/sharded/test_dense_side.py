"""The dense side of the step-0 check is transformers' own: a fault of our reader is on one side alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.errors import ExactnessError
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.upcycling.convert.dense_side import dense_side
from recipes.upcycling.convert.folder_check import describe_tokens, telling_samples
from recipes.upcycling.sharded.sharded_check import measure_whole
from tests.conftest import VOCABULARY, MakeCheckpoint
from tests.grid import each
from tests.recipes.upcycling.sharded.online_cases import Case, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")
# As much of an engine as the check in one memory asks for.
ALONE: Any = SimpleNamespace(rank=0, device=torch.device("cpu"), broadcast=lambda value: value)
COPY, DROP = CopyConfig(num_experts=4), DropConfig(num_experts=4)
QUERIES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
DOWNS = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)]
GATE_AND_UP = [f"model.layers.1.mlp.{matrix}_proj.weight" for matrix in ("gate", "up")]


def some_tokens(samples: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def confusing(first: str, second: str) -> Any:
    """While open, our reader takes each of two tensors for the other."""
    plain = DenseFiles.__init__

    def init(self: DenseFiles, folder: Path, **options: bool) -> None:
        plain(self, folder, **options)
        tensors = self.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return patch.object(DenseFiles, "__init__", init)


@each("pair", [QUERIES, DOWNS, GATE_AND_UP], ids=["queries", "down", "gate and up"])
@each(("method", "words"), [(COPY, "claims to keep the function"), (DROP, "Graft does not read")])
def test_a_reader_that_confuses_tensors_is_caught(
    method: UpcycleConfig, words: str, pair: list[str], make_checkpoint: MakeCheckpoint
) -> None:
    case = Case(make_checkpoint("llama"), method)
    report, _ = measure_whole(ALONE, plan_of(case), some_tokens())
    assert report.loader == "transformers' from_pretrained"
    with confusing(*pair), pytest.raises(ExactnessError, match=words):
        measure_whole(ALONE, plan_of(case), some_tokens())


def untied_by_its_files(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def head_alone(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_prefix(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})


def other_files(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "own.safetensors", {"format": "pt"})
    save_file({n: w + 1 for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))


@each(
    ("family", "options", "change"),
    [
        ("llama", {"sharded": True, "dtype": "bfloat16"}, None),
        ("llama", {"tied": True}, untied_by_its_files),
        ("llama", {"tied": True}, head_alone),
        ("llama", {}, other_files),
        ("gpt2", {"tied": True}, without_prefix),
        ("gemma3_text", {"tied": True}, None),
        ("phi3", {}, None),
    ],
    ids=["parts", "untied", "head alone", "named file", "no prefix", "windows", "fused"],
)
def test_block_by_block_is_what_from_pretrained_gives(
    family: str, options: dict[str, Any], change: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / f"{family}-{getattr(change, '__name__', 'plain')}"
    shutil.copytree(make_checkpoint(family, **options), folder)
    if change is not None:
        change(folder)
    tokens = some_tokens()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = model(input_ids=tokens).logits
    unread = patch.object(DenseFiles, "__init__", side_effect=AssertionError("our reader"))
    ours = "recipes.models.hf.weight_files.weight_files"
    with unread, patch(ours, side_effect=AssertionError("our rule")):
        found = dense_side(folder, tokens, whole=False)
    assert "block by block" in found.loader
    torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_that_does_not_fit_is_read_by_block(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.upcycling.convert.folder_check.spare_bytes", lambda: 0)
    found = dense_side(make_checkpoint("llama"), some_tokens())
    assert "block by block" in found.loader


@each(
    ("named", "shape", "words"),
    [
        ({}, (4, 256), "1024 tokens in samples of 256"),
        ({"sliding_window": 700}, (1, 764), "764 tokens in samples of 764"),
        ({"layer_windows": [300, 500, None]}, (1, 564), "564 tokens in samples of 564"),
        # Nothing is beyond a window of all that the model takes.
        ({"sliding_window": 4096}, (4, 256), "1024 tokens in samples of 256"),
        ({"max_position_embeddings": 90}, (11, 90), "990 tokens in samples of 90"),
        (
            {"sliding_window": 20000, "max_position_embeddings": 65536},
            (4, 256),
            "1024 tokens in samples of 256, none beyond the window of 20000",
        ),
    ],
)
def test_tokens_reach_beyond_windows(
    named: dict[str, Any], shape: tuple[int, int], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096} | named))
    tokens = telling_samples(tmp_path, torch.arange(5000))
    assert tuple(tokens.shape) == shape and describe_tokens(tmp_path, tokens) == words
    short = telling_samples(tmp_path, torch.arange(200))
    assert short.shape[1] == min(200, shape[1])
