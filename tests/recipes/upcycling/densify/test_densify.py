"""Making mixtures dense: the bytes of the dense model that was upcycled, and transformers' class, judge."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.densify
import tools.upcycle
from moe.errors import ModelError
from recipes.models.families.open_mixture import open_mixture
from recipes.upcycling.densify.dense_counterpart import dense_counterpart
from recipes.upcycling.densify.shares import all_shares
from recipes.upcycling.reduce.expert_sums import ExpertSums
from recipes.upcycling.reduce.mix_experts import mix_experts, neuron_order
from tests.grid import each
from tests.recipes.jobs.job_runs import write_text
from tests.recipes.models.families.test_families import make, stored, theirs

_TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(2))
_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}


def _dense(kind: str, dtype: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Saves a random dense model by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(_SIZES) | changes
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def _run(main: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["graft", *words])
    return int(main())


@each(
    "kind, dtype, changes, experts",
    [
        ("llama", "bfloat16", {"rope_theta": 5e5, "tie_word_embeddings": True}, "6"),
        ("qwen2", "bfloat16", {}, "4"),
        ("qwen3", "bfloat16", {"head_dim": 16}, "3"),
        ("phi3", "float32", {"pad_token_id": 0}, "3"),
    ],
)
def test_copies_made_dense_are_the_dense_model_bit_for_bit(
    kind: str,
    dtype: str,
    changes: dict[str, Any],
    experts: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through files of three native classes, and of Graft's own format, in which Phi-3 goes."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    dense = _dense(kind, dtype, tmp_path / "dense", tokenizer_folder, **changes)
    moe, out, text = (str(tmp_path / name) for name in ("moe", "out", "text"))
    words = ("--dense", str(dense), "--out", moe, "--experts", experts, "--top-k", "2", "--no-verify")
    assert _run(tools.upcycle.main, monkeypatch, *words) == 0
    capsys.readouterr()
    given = (moe, "--out", out, "--text", write_text(Path(text)), "--samples", "2", "--json", "-")
    assert _run(tools.densify.main, monkeypatch, *given, "--sequence-length", "16") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], abs=1e-4)
    assert set(figures["residual"].values()) == {0.0} and set(figures["weight_sum"].values()) == {1.0}
    before, after = stored(dense), stored(Path(out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    own, made = theirs(dense), theirs(Path(out))
    assert type(own) is type(made)
    assert own.config.to_diff_dict() | {"_name_or_path": ""} == made.config.to_diff_dict() | {
        "_name_or_path": ""
    }
    with torch.no_grad():
        want, got = (model(input_ids=_TOKENS, use_cache=False).logits for model in (own, made))
    assert torch.equal(want, got)


def test_a_mean_by_hand_and_the_order_of_neurons() -> None:
    """Two neurons; the second expert has them the other way round, each 0.2 more."""
    first = {("up", False): torch.tensor([[1.0], [-2.0]]), ("down", False): torch.tensor([[3.0, 5.0]])}
    other = {("up", False): torch.tensor([[-1.8], [1.2]]), ("down", False): torch.tensor([[5.2, 3.2]])}
    assert neuron_order(first, other).tolist() == [1, 0]
    mixed = mix_experts(iter([first, other]), [0.75, 0.25], aligns=True)
    assert torch.allclose(mixed.weights["up", False], torch.tensor([[1.05], [-1.95]]))
    assert torch.allclose(mixed.weights["down", False], torch.tensor([[3.05, 5.05]]))
    # Squares of the first: 1 + 4 + 9 + 25 = 39. As they are: 2.8^2 + 3.2^2 + 2.2^2 + 1.8^2 = 26.16.
    assert mixed.before == pytest.approx(26.16 / 39) and mixed.after == pytest.approx(4 * 0.04 / 39)


def test_shares_by_hand() -> None:
    """Tokens 6, 2, 0, 0 of 8."""
    rows = (torch.tensor([6.0, 2.0, 0.0, 0.0]).double() for _ in range(4))
    sums = ExpertSums(*rows, torch.eye(4), 8)
    found = {name: one.shares_E(sums).tolist() for name, one in all_shares().items()}
    assert found == {"average": [0.25] * 4, "frequency": [0.75, 0.25, 0.0, 0.0]}


@each(
    "family, changes, words",
    [
        ("granitemoe", {}, "no dense class that computes the rest of a Granite-MoE.*graft prune or merge"),
        ("olmoe", {}, "no dense class .* OLMoE"),
        ("qwen2_moe", {}, "wide and its dense networks|for which a dense network"),
        ("qwen3_moe", {}, "parts of a network"),
    ],
)
def test_mixtures_without_a_dense_counterpart_are_refused(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        dense_counterpart(open_mixture(make(family, **changes)))


def test_virtual_groups_are_refused() -> None:
    mixture = open_mixture(make("mixtral"))
    rows_ED = mixture.spec.moe_blocks[1].router.rows_ED()
    with torch.no_grad():
        rows_ED[5] = rows_ED[4]
    with pytest.raises(ModelError, match="virtual group"):
        dense_counterpart(mixture)


def test_a_window_makes_a_mixtral_a_mistral() -> None:
    for window, kind in ((None, "llama"), (24, "mistral")):
        names, content = dense_counterpart(open_mixture(make("mixtral", sliding_window=window)))
        assert content["model_type"] == kind and content.get("sliding_window") == window
        assert names.ffns[0].shape.width == content["intermediate_size"] == 48
