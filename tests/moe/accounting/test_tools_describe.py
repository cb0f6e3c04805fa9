"""``python -m tools.describe``: figures from a config alone, and from a module where the table ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe.accounting.flops import CONVENTIONS
from moe.errors import ConfigError, ModelError, UserError
from recipes.models.hf.shape_from_module import shape_from_module
from tests.forked_commands import run_module
from tests.moe.accounting.family_cases import SMALL
from tests.moe.accounting.published import DEEPSEEK_V3, GPT_OSS_20B, JAMBA, LLAMA4_SCOUT, MODELS, QWEN3_30B
from tools.describe import main

DENSE = {**SMALL, "model_type": "llama"}
STARCODER = {**SMALL, "model_type": "starcoder2", "sliding_window": None}


def described(config: dict[str, Any], folder: Path, *flags: str) -> Any:
    """What ``--json`` writes."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    target = folder / "figures.json"
    assert main([str(folder), "--json", str(target), *flags]) == 0
    return json.loads(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_contract_of_the_json(model: Any, tmp_path: Path) -> None:
    figures = described(model.config, tmp_path)
    assert figures["parameters"] == {
        "total": model.total,
        "active": model.active,
        "active_without_input_embedding": model.without_input,
        "active_without_embeddings": model.without_both,
        "per_expert": model.expert,
    }
    assert figures["kv_bytes_per_token"] == model.kv
    assert set(figures["flops_per_token"]) == set(CONVENTIONS)
    for both in figures["flops_per_token"].values():
        assert set(both) == {"forward", "training"} and both["training"] == pytest.approx(3 * both["forward"])
    assert set(figures["flops_counted"]) == set(CONVENTIONS)


def test_sequence_length_and_dtype_of_the_cache(tmp_path: Path) -> None:
    figures = described(QWEN3_30B, tmp_path, "--sequence-length", "8192", "--kv-dtype", "fp8")
    assert figures["flops_per_token"]["torchtitan"]["training"] == 37_578_559_488
    assert figures["kv_bytes_per_token"] == 98_304 // 2
    assert figures["sequence_length"] == 8192


def test_stdout_holds_json_alone(tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps(DENSE), encoding="utf-8")
    done = run_module("tools.describe", str(file), "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["parameters"]["per_expert"] == 0
    assert "cache: 240 bytes a token" in done.err  # 5 layers, 2 * 2 * 6 elements, 2 bytes


def test_memory_of_training_and_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = described(DENSE, tmp_path, "--sequence-length", "8", "--batch-size", "2")
    total = figures["parameters"]["total"]
    training = figures["training_memory"]
    assert [training[name] for name in ("weights", "gradients", "optimizer")] == [
        4 * total,
        4 * total,
        8 * total,
    ]
    # A token keeps 4*24 of norms, (2*4 + 2*2)*6 of attention and 3*40 of the network in each of 5 blocks at 2
    # bytes, and 101 logits at 2 + 4.
    assert training["activations"] == 16 * (5 * (96 + 72 + 120) * 2 + 101 * 6)
    # Recomputed: the inputs of 5 blocks, and one block whole.
    assert training["activations_recomputed"] == 16 * ((5 * 24 + 288) * 2 + 101 * 6)
    assert figures["serving_memory"] == {"weights": 2 * total, "cache": 2 * 8 * 240}
    out = capsys.readouterr().out
    assert "bfloat16, assumed: the config names no dtype" in out and "rough" in out


def test_what_a_batch_reads_is_a_bound_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = described(QWEN3_30B, tmp_path, "--batch-size", "8", "--bits", "expert=4.25")["decode_step"]
    assert step["distinct_experts_source"] == "estimated-uniform-upper-bound"
    assert step["distinct_experts_mean"] == pytest.approx(51.6, abs=0.05)
    assert step["bytes"]["experts"] == pytest.approx(48 * step["distinct_experts_mean"] * 4_718_592 * 0.53125)
    assert step["strict"] < step["complete"] < step["as_if_dense"]
    assert "estimated-uniform-upper-bound" in capsys.readouterr().out


@pytest.mark.parametrize("config", [DEEPSEEK_V3, GPT_OSS_20B, JAMBA, LLAMA4_SCOUT, DENSE])
def test_every_kind_of_model_can_be_read(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described(config, tmp_path)
    out = capsys.readouterr().out
    assert str(config["model_type"]) in out
    assert all(name in out for name in CONVENTIONS)


def test_a_part_of_a_model_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = described({"model_type": "llama4", "text_config": LLAMA4_SCOUT}, tmp_path)
    assert figures["part"] == "text tower"
    assert "llama4 (text tower)" in capsys.readouterr().out


def test_a_family_outside_the_table_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(STARCODER), encoding="utf-8")
    with pytest.raises(
        ConfigError, match="model_type='starcoder2': no accounting knows this family"
    ) as caught:
        main([str(tmp_path)])
    assert "--from-module" in str(caught.value)


def test_a_module_where_the_table_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = described(STARCODER, tmp_path, "--from-module", "--sequence-length", "8")
    found = shape_from_module(STARCODER)
    assert figures["parameters"]["total"] == found.count.total
    assert figures["kv_bytes_per_token"] == 240
    assert figures["flops_per_token"]["palm"]["forward"] > 2 * found.count.active
    # What is counted of a module is what is read of a config, where both can be done.
    both = [described(DENSE, tmp_path, *flags) for flags in ((), ("--from-module",))]
    for key in ("parameters", "kv_bytes_per_token", "flops_per_token"):
        assert both[0][key] == both[1][key]
    assert "starcoder2" in capsys.readouterr().out


def test_attention_that_is_not_known_leaves_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "mamba",
        "vocab_size": 101,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "state_size": 4,
    }
    figures = described(config, tmp_path, "--from-module")
    assert figures["parameters"]["total"] > 0
    assert figures["kv_bytes_per_token"] is None
    assert set(figures["flops_per_token"].values()) == {None}
    assert "cache: not known" in capsys.readouterr().out


def test_a_module_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match="model_type='nobody': transformers cannot build it"):
        shape_from_module({"model_type": "nobody"})
    with pytest.raises(UserError, match="transformers cannot build it"):
        shape_from_module({})


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    flags = ["--sequence-length", "0", "--batch-size", "0", "--json", str(tmp_path)]
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "absent.json"), *flags])
    paths = [mistake.path for mistake in caught.value.mistakes]
    assert sorted(paths) == ["--batch-size", "--json", "--sequence-length", "CONFIG"]


@pytest.mark.parametrize(("text", "rule"), [("[]", "it holds no mapping"), ("{", "it is not JSON")])
def test_files_that_are_no_configs(text: str, rule: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rule):
        main([str(file)])


def test_flags_with_other_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE), encoding="utf-8")
    with pytest.raises(ConfigError, match="--kv-dtype='float7': no accounting knows this dtype"):
        main([str(tmp_path), "--kv-dtype", "float7"])
    with pytest.raises(ConfigError, match="--bits='experts=4': it must be CLASS=BITS"):
        main([str(tmp_path), "--bits", "experts=4"])


def test_memories_of_several_speeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = ("--tier", "hbm=3350", "--tier", "pcie=55:experts=0.75")
    step = described(QWEN3_30B, tmp_path, *tiers)["decode_step"]
    found = step["tiers"]
    assert found["tiers"][1]["bytes"] == pytest.approx(0.75 * step["bytes"]["experts"])
    assert found["most_tokens_per_s"] == pytest.approx(55e9 / found["tiers"][1]["bytes"])
    assert "by memory" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="first tier"):
        described(QWEN3_30B, tmp_path, "--tier", "hbm=1:experts=1")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "kernel_config"])
def test_a_config_that_asks_for_code_of_a_hub_is_not_built(key: str) -> None:
    value = {"RMSNorm": "some/repo:norm"} if key == "kernel_config" else "some/repo"
    for content in ({key: value}, {"text_config": {key: value}}):
        with pytest.raises(ModelError, match="asks for code of a hub"):
            shape_from_module(STARCODER | content)
