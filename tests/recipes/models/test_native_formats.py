"""Every native class of transformers: plain `from_pretrained` gives the logits of what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe.dispatch.local import LocalDispatcher
from moe.experts.shared import SharedExpert
from moe.experts.weights import FFNWeights
from moe.routers import router_class
from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from recipes.models.export import choose_exporter, exporters
from recipes.models.export.read_back import ReadBack
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.models.hf.hf_model import HFModel, load_model
from tests.conftest import MakeCheckpoint
from tests.grid import each
from tests.moe.routers.routing_cases import make_context, make_router
from tests.recipes.models.test_exporters import assert_same_logits, names_in, reload
from tests.recipes.models.whole_surgery import Surgery, swap

pytestmark = pytest.mark.usefixtures("one_thread")

TOPK = TopKConfig(top_k=2)
PLAIN = TopKConfig(top_k=2, renormalise=False)
V3 = DeepSeekV3Config(top_k=2, num_groups=2, top_groups=1, routed_scaling=2.5)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 7000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Format, host family, its options, layers, router, width of the shared expert as a multiple of F / 4.
CASES: list[tuple[str, str, dict[str, Any], str, RouterConfig, int]] = [
    ("qwen3_moe", "qwen3", {}, "all", TOPK, 0),
    ("qwen3_moe", "qwen3", {"tied": True}, "last:1", PLAIN, 0),
    ("qwen3_moe", "qwen3", {"attention_bias": True, "rms_norm_eps": 0.1}, "every:2", TOPK, 0),
    ("qwen2_moe", "qwen2", {}, "all", TOPK, 0),
    ("qwen2_moe", "qwen2", {"tied": True}, "every:2", PLAIN, 3),
    ("flex_olmo", "olmo2", {}, "all", TOPK, 0),
    ("flex_olmo", "olmo2", {"attention_bias": True, "tied": True}, "all", PLAIN, 0),
    ("glm4_moe", "llama", {"rope_parameters": LLAMA3_ROPE}, "all", V3, 0),
    ("glm4_moe", "llama", {"head_dim": 16, "tied": True}, "last:2", V3, 8),
    ("glm4_moe", "qwen2", {}, "all", V3, 4),
    ("glm4_moe", "qwen3", {}, "last:1", V3, 0),
    ("glm4_moe", "mistral", {"sliding_window": None}, "all", V3, 0),
]


def moe_in(folder: Path, layers: str, router: RouterConfig, shared_quarters: int) -> HFModel:
    """A mixture whose parts have become different, as training makes them."""
    model = load_model(folder)
    surgery = Surgery(
        method=Copy(CopyConfig(num_experts=4, noise_std=0.5, layers=layers)),
        make_router=lambda width, experts: router_class(router.name)(router, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=3,
    )
    swap(model, surgery)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in model.moe_layers():
            layer.router.weight_ED.mul_(20)
            if "bias_E" in layer.router.state_dict():
                layer.router.bias_E.copy_(torch.randn(4, generator=generator) * 0.3)
            if shared_quarters:
                D, F = layer.experts.w_down_EDF.shape[1:]
                W = F * shared_quarters // 4
                gate, up, down = (
                    torch.randn(shape, generator=generator) * 0.2 for shape in ((W, D), (W, D), (D, W))
                )
                layer.shared = SharedExpert(FFNWeights(up, down, layer.experts.activation, gate))
    model.module.eval()
    return model


@each(
    ("family", "layers", "num"),
    [("llama", "all", 3), ("qwen2", "last:1", 1), ("qwen3", "all", 3), ("olmo2", "all", 3)],
)
@each("top_k", [2, 3])
def test_transformers_balance_loss_has_the_same_gradients(
    make_checkpoint: MakeCheckpoint, family: str, layers: str, num: int, top_k: int
) -> None:
    config = TopKConfig(top_k=top_k, balance_coef=0.02)
    spec = describe_model(moe_in(make_checkpoint(family), layers, config, 0))
    exporter, _ = choose_exporter(spec)
    assert len(spec.moe_blocks) == num
    router = make_router(config, 6, 4)
    x_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(router(x_TD, make_context()).losses["balance"], router.weight_ED)[0]
    # All layers alike, each with a router of its own.
    weights = [router.weight_ED.detach().clone().requires_grad_() for _ in range(num)]
    logits = tuple(x_TD @ weight_ED.t() for weight_ED in weights)
    loss = load_balancing_loss_func(logits, num_experts=4, top_k=top_k)
    coefficient = exporter.config(spec)["router_aux_loss_coef"]
    for theirs in torch.autograd.grad(coefficient * loss, weights):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(("name", "family", "options", "layers", "router", "shared"), CASES)
def test_plain_transformers_computes_what_was_exported(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    name: str,
    family: str,
    options: dict[str, Any],
    layers: str,
    router: RouterConfig,
    shared: int,
    layout: Any,
) -> None:
    model = moe_in(make_checkpoint(family, **options), layers, router, shared)
    exporter, _ = choose_exporter(describe_model(model))
    assert exporter.name == name
    tensors = model.module.state_dict().items()
    export(model, exporter, tensors, tmp_path / "hf", torch.float32, writes=True, layout=layout)
    module = reload(tmp_path / "hf")
    assert_same_logits(module, model)
    # Block by block it is read as transformers reads it whole.
    assert_same_logits(ReadBack(exporter.open(tmp_path / "hf"), memory_bytes=0).model, model)
    if layout == "per_expert":
        # The file that transformers itself would write has the same names.
        module.save_pretrained(tmp_path / "theirs")
        assert names_in(tmp_path / "hf") == names_in(tmp_path / "theirs")
    ours = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ours["architectures"] == [type(module).__name__]


def test_every_native_format_has_a_case() -> None:
    tested = {case[0] for case in CASES} | {"mixtral"}
    assert tested == {name for name, exporter in exporters().items() if exporter.is_native}


@pytest.mark.usefixtures("auto_classes")
def test_auto_classes_load_our_own_format_after_the_import(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = moe_in(make_checkpoint("gpt2", tied=True), "every:2", TOPK, 0)
    exporter, _ = choose_exporter(describe_model(model))
    export(model, exporter, model.module.state_dict().items(), tmp_path / "hf", torch.float32, writes=True)

    module = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert_same_logits(module, model)
    assert any(".experts.3.down." in name for name in names_in(tmp_path / "hf"))
    # What it saves is whole again.
    module.save_pretrained(tmp_path / "again")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
