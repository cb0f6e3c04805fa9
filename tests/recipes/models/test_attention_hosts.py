"""Attention experts in decoders of transformers: exact with all heads at 1, cached, exported, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from moe.accounting.flops import flops_from_shape
from moe.accounting.params import count_from_shape, count_parameters
from moe.accounting.shape import shape_from_config
from moe.attention.attention_config import AttentionConfig
from moe.errors import ConfigError, ModelError
from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.configs.topk_config import TopKConfig
from recipes.models.export import choose_exporter, exporters
from recipes.models.export.graft_format import GraftExporter, load_graft
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export, verify_export
from recipes.models.hf.attention_blocks import attention_mistakes, swap_attention, upcycle_attention
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.training.model_costs import measure_costs
from tests.conftest import VOCABULARY, MakeCheckpoint, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, every head": ("llama", {"num_key_value_heads": 4}),
    "mistral, window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def make_model(family: str = "llama", **config: Any) -> HFModel:
    """Four key-value heads, unless it is told otherwise."""
    return HFModel(random_model(family, **{"num_key_value_heads": 4} | config), Path(), torch.float32)


def choosing(top_k: int = 2, layers: Any = "all") -> AttentionConfig:
    """Decided routing, weights that differ."""
    return AttentionConfig(router=TopKConfig(top_k=top_k, init_std=0.5), layers=layers)


def some_tokens(num: int = 20) -> Tensor:
    """``[2, num]``."""
    return torch.randint(1, VOCABULARY, (2, num), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def padded_logits(model: Any) -> Tensor:
    """Of what is real in a batch whose first sequence begins with padding."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=some_tokens(), attention_mask=mask, position_ids=positions).logits
    return logits[mask.bool()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", MODELS)
def test_all_heads_at_one_are_the_dense_model(case: str, implementation: str) -> None:
    family, config = MODELS[case]
    module = random_model(family, **config)
    module.set_attn_implementation(implementation)
    model = HFModel(module, Path(), torch.float32)
    dense = padded_logits(module)
    heads = AttentionConfig(router=OnePlusConfig(top_k=module.config.num_key_value_heads))
    report = upcycle_attention(model, heads, 0, some_tokens())
    assert report.claimed_exact and report.logits.relative < 1e-4
    assert [index for index, _ in model.attention_layers()] == [0, 1, 2]
    # fp32, summed in another order.
    torch.testing.assert_close(padded_logits(module), dense, rtol=0, atol=1e-5 * float(dense.abs().max()))


def test_fewer_heads_are_measured_and_layers_can_be_chosen() -> None:
    model = make_model()
    report = upcycle_attention(model, choosing(layers="last:1"), 0, some_tokens())
    assert not report.claimed_exact
    assert [drift.layer for drift in report.drifts] == [2] == list(report.layers)
    assert report.drifts[0].relative_error > 0.1
    assert (report.num_experts, report.top_k, report.scale) == (4, 2, 2.0)


@pytest.mark.parametrize(
    ("family", "config", "layers"),
    [
        ("llama", {}, "all"),
        ("qwen3", {}, [0, 2]),
        ("mistral", {"sliding_window": 5}, [1]),
        ("mistral", {"sliding_window": 5}, "all"),
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_the_whole_recomputed(
    family: str, config: dict[str, Any], layers: Any, beams: int
) -> None:
    model = make_model(family, **config)
    swap_attention(model, choosing(layers=layers), 0)
    module, prompt = model.module.eval(), some_tokens(9)
    for size in (1, 2):
        mask = torch.ones(size, 9, dtype=torch.long)
        if size == 2:
            mask[0, :4] = 0
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
        options |= {"pad_token_id": 0, "eos_token_id": None}
        cached = module.generate(prompt[:size], use_cache=True, **options)
        assert torch.equal(cached, module.generate(prompt[:size], use_cache=False, **options))


@torch.no_grad()
def test_the_cache_holds_what_was_routed_and_no_more() -> None:
    model = make_model()
    swap_attention(model, choosing(layers=[0, 2]), 0)
    cache = DynamicCache(config=model.config)
    tokens = some_tokens()[:1]
    for part in (tokens[:, :13], tokens[:, 13:14], tokens[:, 14:]):
        model.module.eval()(input_ids=part, past_key_values=cache, use_cache=True)
    # 20 tokens, 2 of 4 heads each, in one sequence: no padding. Dense layers hold all 4 heads.
    assert [cache.layers[i].memory.num_rows for i in (0, 2)] == [40, 40]
    assert cache.layers[1].keys.shape == (1, 4, 20, 8)
    assert cache.get_seq_length() == 20
    kept = cache.layers[0].memory.experts
    assert sum(found.keys_BMH.numel() for found in kept.values()) == 40 * 8


@torch.no_grad()
def test_what_cannot_be_cached_or_masked_is_refused() -> None:
    model = make_model()
    swap_attention(model, choosing(), 0)
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ModelError, match="cache_implementation='dynamic'"):
        model.module(input_ids=some_tokens(), past_key_values=static, use_cache=True)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        model.module(input_ids=some_tokens(), use_cache=False)


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        ("gemma2", {}, "this model is 'gemma2'"),
        ("gpt2", {}, "this model is 'gpt2'"),
        ("llama", {"num_key_value_heads": 1}, "1 key-value head"),
    ],
)
def test_other_models_are_refused_by_name(family: str, config: dict[str, Any], match: str) -> None:
    model = HFModel(random_model(family, **config), Path(), torch.float32)
    with pytest.raises(ConfigError, match=match):
        swap_attention(model, choosing(), 0)


def test_mistakes_are_found_in_the_config_alone() -> None:
    dense = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4}
    assert attention_mistakes(choosing(top_k=4), dense) == []
    found = attention_mistakes(choosing(top_k=5, layers=[7]), dense)
    assert [mistake.path for mistake in found] == ["attention.router.top_k", "attention.layers"]


def test_an_attention_that_does_something_else_is_refused() -> None:
    model = make_model()
    model.module.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(ModelError, match="layer 1 .LlamaAttention. computes something else"):
        swap_attention(model, choosing(), 0)


@pytest.fixture
def exported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> tuple[HFModel, Path]:
    """A Qwen3 with biases, norms and dense layers between, in Graft's own format."""
    model = load_model(make_checkpoint("qwen3", num_key_value_heads=4, attention_bias=True, tied=True))
    swap_attention(model, choosing(layers=[0, 2]), 0)
    model.module.eval()
    exporter, unsupported_reasons = choose_exporter(describe_model(model))
    assert exporter.name == "graft" and "Qwen3-MoE has no attention experts" in unsupported_reasons
    folder = tmp_path / "hf"
    export(model, exporter, model.module.state_dict().items(), folder, torch.float32, writes=True)
    return model, folder


@pytest.mark.usefixtures("auto_classes")
@torch.no_grad()
def test_an_export_is_the_same_model(exported: tuple[HFModel, Path], tmp_path: Path) -> None:
    model, folder = exported
    logits = model.module(input_ids=some_tokens()).logits
    report = verify_export(GraftExporter(), folder, some_tokens(), logits)
    assert report.logits.max_diff == 0
    by_block = verify_export(GraftExporter(), folder, some_tokens(), logits, 0)
    assert by_block.logits.max_diff == 0 and by_block.sample is None
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(module(input_ids=some_tokens()).logits, logits)
    module.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(input_ids=some_tokens()).logits, logits)


@pytest.mark.usefixtures("auto_classes")
def test_routers_keep_their_precision(exported: tuple[HFModel, Path]) -> None:
    model, folder = exported
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cut, dense = (module.model.layers[i].self_attn for i in (0, 1))
    assert cut.experts.w_q_EQD.dtype == dense.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(cut.router.weight_ED, model.attention_layers()[0][1].router.weight_ED)


def test_no_native_format_takes_it_and_the_accounting_does(exported: tuple[HFModel, Path]) -> None:
    model, folder = exported
    refused = {
        name for name, one in exporters().items() if one.unsupported_reason(describe_model(model)) is not None
    }
    assert refused == set(exporters()) - {"graft"}
    content = json.loads((folder / "config.json").read_text())
    assert content["format_version"] == 3
    shape, costs = shape_from_config(content), measure_costs(model, 20, None)
    assert count_from_shape(shape) == count_parameters(model.module)
    assert costs.flops_per_token_forward == flops_from_shape(shape, 20).forward
    assert costs.flops_per_token_train == 3 * costs.flops_per_token_forward
    # Two layers, two of four heads each: half of their projections and query, key and value biases.
    one_head = 4 * 32 * 8 + 3 * 8
    assert costs.total_params - costs.active_params == 2 * 2 * one_head


def test_an_export_of_another_version_is_refused(exported: tuple[HFModel, Path]) -> None:
    _, folder = exported
    content = json.loads((folder / "config.json").read_text()) | {"format_version": 2}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="its format_version is 2, and 3 is known"):
        load_graft(folder)


def test_without_it_the_format_stays_what_it_was(make_checkpoint: MakeCheckpoint) -> None:
    model = load_model(make_checkpoint("llama"))
    content = GraftExporter().config(describe_model(model))
    assert content["format_version"] == 2 and "attention_layers" not in content
    assert model.routed_layers() == []
