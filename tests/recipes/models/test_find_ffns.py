"""Every family's feed-forward networks are found, and swapping mixtures in keeps the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError, ExactnessError, ModelError
from moe.experts.weights import FFNWeights
from moe.layer import MoELayer
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws, LayerPlan
from recipes.models.hf.ffn_blocks import dense_ffn, find_ffns
from recipes.models.hf.hf_model import HFModel, load_model
from tests.conftest import VOCABULARY, MakeCheckpoint, random_model
from tests.recipes.models.whole_surgery import Surgery, swap, upcycle

pytestmark = pytest.mark.usefixtures("one_thread")

# Family: module path of the first network, its activation, gated, with biases.
FAMILIES = {
    "llama": ("model.layers.0.mlp", "silu", True, False),
    "mistral": ("model.layers.0.mlp", "silu", True, False),
    "qwen2": ("model.layers.0.mlp", "silu", True, False),
    "qwen3": ("model.layers.0.mlp", "silu", True, False),
    "gemma2": ("model.layers.0.mlp", "gelu_pytorch_tanh", True, False),
    "gemma3_text": ("model.layers.0.mlp", "gelu_pytorch_tanh", True, False),
    "olmo2": ("model.layers.0.mlp", "silu", True, False),
    "phi": ("model.layers.0.mlp", "gelu_new", False, True),
    "phi3": ("model.layers.0.mlp", "silu", True, False),
    "gpt2": ("transformer.h.0.mlp", "gelu_new", False, True),
    "gpt_neox": ("gpt_neox.layers.0.mlp", "gelu", False, True),
    "starcoder2": ("model.layers.0.mlp", "gelu_pytorch_tanh", False, True),
    "stablelm": ("model.layers.0.mlp", "silu", True, False),
    "falcon": ("transformer.h.0.mlp", "gelu", False, False),
    "cohere": ("model.layers.0.mlp", "silu", True, False),
    "glm4": ("model.layers.0.mlp", "silu", True, False),
    "granite": ("model.layers.0.mlp", "silu", True, False),
    "nemotron": ("model.layers.0.mlp", "relu2", False, False),
    "gptj": ("transformer.h.0.mlp", "gelu_new", False, True),
    "smollm3": ("model.layers.0.mlp", "silu", True, False),
    "arcee": ("model.layers.0.mlp", "relu2", False, False),
}
REFUSED = {
    "opt": "found: none",
    "bloom": "takes hidden_states, residual where a plain feed-forward network takes one input",
    "mpt": "takes hidden_states, residual where a plain feed-forward network takes one input",
}


def model_of(model: Any) -> HFModel:
    """A host around a model that was never saved."""
    return HFModel(module=model, folder=Path("nowhere"), source_dtype=torch.float32)


def surgery_of(method: Copy | None = None, **router: Any) -> Surgery:
    """Four experts, top-2, unless told otherwise."""
    config = TopKConfig(**{"top_k": 2} | router)
    return Surgery(
        method=method or Copy(CopyConfig(num_experts=4)),
        make_router=lambda width, experts: TopKRouter(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )


def some_tokens() -> torch.Tensor:
    """``[2, 24]``."""
    return torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_are_found_and_upcycling_is_exact(family: str) -> None:
    module = random_model(family)
    sites = find_ffns(module, module.config)
    name, activation, gated, biased = FAMILIES[family]
    assert [site.name for site in sites] == [name.replace(".0.", f".{layer}.") for layer in range(3)]
    weights = sites[0].weights
    assert weights.activation == activation
    assert (weights.gate_FD is not None, weights.b_up_F is not None) == (gated, biased)
    assert weights.b_down_D is None or biased
    # Views of the model's own parameters, not copies.
    own = {parameter.data_ptr() for parameter in module.get_submodule(name).parameters()}
    assert weights.up_FD.data_ptr() in own or gated

    model, tokens = model_of(module), some_tokens()
    with torch.no_grad():
        before = module(input_ids=tokens).logits
    report = upcycle(model, surgery_of(), tokens)
    with torch.no_grad():
        after = module(input_ids=tokens).logits
    assert report.claimed_exact
    assert report.layers == (0, 1, 2)
    assert [index for index, _ in model.moe_layers()] == [0, 1, 2]
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=0)
    # The report's own figures are those of the logits.
    assert report.logits.max_diff == pytest.approx(float((after - before).abs().max()), abs=1e-9)
    assert [drift.layer for drift in report.drifts] == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_the_networks_matter_in_these_models(family: str) -> None:
    # Guards the test above: were the networks without effect, any surgery would pass.
    model, tokens = random_model(family), some_tokens()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        for site in find_ffns(model, model.config):
            site.weights.down_DF.mul_(1.01)
        after = model(input_ids=tokens).logits
    assert float((after - before).abs().max() / before.abs().max()) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_optional_biases_are_taken_over(bias: bool) -> None:
    model = random_model("llama", mlp_bias=bias)
    weights = find_ffns(model, model.config)[0].weights
    assert (weights.b_gate_F is not None, weights.b_down_D is not None) == (bias, bias)
    assert upcycle(model_of(model), surgery_of(), some_tokens()).claimed_exact


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_plain_network_is_refused_by_name(family: str) -> None:
    model = random_model(family)
    with pytest.raises(ModelError) as caught:
        find_ffns(model, model.config)
    message = str(caught.value)
    assert message.startswith(f"dense={family!r}: ")
    assert REFUSED[family] in message
    assert "not supported" in message


def test_a_network_that_computes_something_else_is_refused() -> None:
    model = random_model("llama")
    mlp = model.model.layers[1].mlp
    plain_forward = mlp.forward
    mlp.forward = lambda x: 1.01 * plain_forward(x)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp \(LlamaMLP\) computes something else"):
        find_ffns(model, model.config)


def test_an_unknown_activation_is_refused() -> None:
    model = random_model("llama")
    model.config.hidden_act = "snake"
    with pytest.raises(ModelError, match=r"hidden_act='snake' is unknown. Known are: .*silu"):
        find_ffns(model, model.config)


def test_unknown_names_are_told_by_shape() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_gate = nn.Linear(32, 48)
            self.widen = nn.Linear(32, 48)
            self.narrow = nn.Linear(48, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(nn.functional.silu(self.my_gate(x)) * self.widen(x))

    model = random_model("llama")
    for block in model.model.layers:
        block.mlp = Odd()
    odd = model.model.layers[2].mlp
    weights = find_ffns(model, model.config)[2].weights
    assert weights.gate_FD is not None
    assert weights.gate_FD.data_ptr() == odd.my_gate.weight.data_ptr()
    assert weights.down_DF.data_ptr() == odd.narrow.weight.data_ptr()
    assert upcycle(model_of(model), surgery_of(), some_tokens()).claimed_exact


def test_dense_ffn_by_hand() -> None:
    # x = (1, 2): gate = relu(1, -1) = (1, 0); up = (3, 4); hidden = (3, 0);
    # down = (2*3 + 5*0, 1*3 + 5*0) = (6, 3), and with the bias (1, 1) it is (7, 4).
    weights = FFNWeights(
        gate_FD=torch.tensor([[1.0, 0.0], [1.0, -1.0]]),
        up_FD=torch.tensor([[1.0, 1.0], [0.0, 2.0]]),
        down_DF=torch.tensor([[2.0, 5.0], [1.0, 5.0]]),
        b_down_D=torch.ones(2),
        activation="relu",
    )
    assert dense_ffn(torch.tensor([[1.0, 2.0]]), weights).tolist() == [[7.0, 4.0]]


class _Sabotaged(Copy):
    """Alters one matrix of one expert of the second layer."""

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        plan = super().plan(shape, draws, statistics)
        if draws.layer != 1:
            return plan
        return LayerPlan((*plan.experts[:-1], replace(plan.experts[-1], scale={"down": 1.01})))


def test_a_sabotaged_method_is_refused_with_the_layer_named() -> None:
    method = _Sabotaged(CopyConfig(num_experts=4))
    with pytest.raises(ExactnessError) as caught:
        upcycle(model_of(random_model("llama")), surgery_of(method), some_tokens())
    message = str(caught.value)
    assert "Differing: layer 1 (by 5.47e-03)" in message  # a hundredth, at the weight of one expert of two
    assert "layer 0" not in message
    assert "layer 2" not in message


def test_a_host_that_changes_elsewhere_is_refused() -> None:
    # Every layer agrees on its own input, and the logits do not.
    model = random_model("llama")
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(0) or out * len(calls))
    with pytest.raises(ExactnessError, match="Each single layer agrees; the model changed elsewhere"):
        upcycle(model_of(model), surgery_of(), some_tokens())


def test_an_inexact_router_reports_its_drift() -> None:
    surgery = surgery_of(top_k=1, renormalise=False)
    report = upcycle(model_of(random_model("llama")), surgery, some_tokens())
    assert not report.claimed_exact
    assert report.logits.relative > 1e-3
    assert report.logits.kl > 0
    for drift in report.drifts:
        # Every copy is the dense network, so a mixture of one expert scales it by the gate's softmax,
        # which is below 1 and above 1/4 for four experts.
        assert 0.25 < drift.gain < 1
        # |g f - f| / |f| = 1 - g where g is the same for all tokens; it varies a little.
        assert drift.relative_error == pytest.approx(1 - drift.gain, abs=0.05)


def test_noisy_copies_claim_nothing() -> None:
    method = Copy(CopyConfig(num_experts=4, noise_std=0.1))
    report = upcycle(model_of(random_model("llama")), surgery_of(method), some_tokens())
    assert not report.claimed_exact
    assert report.logits.relative > 1e-4


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2]), ("every:2", [0, 2]), ("every:2:1", [1]), ("last:1", [2]), ([2, 0], [0, 2])],
)
def test_some_layers_only(layers: Any, expected: list[int]) -> None:
    model = model_of(random_model("llama"))
    method = Copy(CopyConfig(num_experts=4, layers=layers))
    assert upcycle(model, surgery_of(method), some_tokens()).layers == tuple(expected)
    moe_blocks = [isinstance(block.mlp, MoELayer) for block in model.module.model.layers]
    assert [i for i, is_moe in enumerate(moe_blocks) if is_moe] == expected


def test_layers_that_the_host_lacks_are_a_mistake() -> None:
    method = Copy(CopyConfig(num_experts=4, layers=[0, 7]))
    with pytest.raises(ConfigError, match=r"upcycle.layers=\[0, 7\]: layers \[7\] do not exist"):
        swap(model_of(random_model("llama")), surgery_of(method))


def test_routers_differ_by_layer_and_are_the_same_again() -> None:
    routers = []
    for _ in range(2):
        model = model_of(random_model("llama"))
        torch.manual_seed(len(routers))  # must not matter
        swap(model, surgery_of())
        routers.append([layer.router.weight_ED for _, layer in model.moe_layers()])
    assert all(torch.equal(a, b) for a, b in zip(*routers, strict=True))
    assert not torch.equal(routers[0][0], routers[0][1])


def test_experts_are_copies_with_memory_of_their_own() -> None:
    model = model_of(random_model("llama"))
    sites = find_ffns(model.module, model.config)
    swap(model, surgery_of())
    _, layer = model.moe_layers()[0]
    down_EDF = layer.experts.w_down_EDF.detach()
    assert all(torch.equal(expert, sites[0].weights.down_DF) for expert in down_EDF)
    down_EDF[1] += 1
    assert torch.equal(down_EDF[0], sites[0].weights.down_DF)


@pytest.mark.parametrize("options", [{"sharded": True}, {"tied": True}, {"sharded": True, "tied": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_load(make_checkpoint: MakeCheckpoint, options: dict[str, bool], dtype: str) -> None:
    folder = make_checkpoint("llama", dtype=dtype, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == options.get("sharded", False)
    model = load_model(folder)
    assert model.source_dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert not model.config.use_cache
    tied = options.get("tied", False)
    assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied
    expected = random_model("llama", tie_word_embeddings=tied).to(getattr(torch, dtype)).float()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name
    assert upcycle(model, surgery_of(), some_tokens()).claimed_exact
