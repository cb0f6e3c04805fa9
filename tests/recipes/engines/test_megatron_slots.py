"""What stands in Megatron's slots, and what the engine refuses; nothing here needs megatron-core."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError
from moe.layer import MoELayer
from moe.routers import router_classes
from moe.routers.configs import RouterConfig
from moe.routers.configs.avg_k_config import AvgKConfig
from moe.routers.configs.soft_moe_config import SoftMoEConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.types import LayerContext, RouterContext, Routing
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.engines.megatron.gpt_shape import (
    blocks_of_stages,
    family_mistakes,
    megatron_layout,
    read_shape,
    split_mistakes,
)
from recipes.engines.megatron.layer_slots import (
    Attention,
    ExpertsSlot,
    RouterSlot,
    SharedSlot,
    as_map,
    slot_of,
)
from recipes.engines.megatron.megatron_engine import MegatronConfig, MegatronEngine
from recipes.engines.optim.config import OptimConfig
from tests.moe.dispatch.dispatch_cases import make_experts
from tests.moe.routers.routing_cases import _tell_batch, label, make_layer, router_case

EXPERTS, WIDTH = 8, 6


def _layer(**router: Any) -> MoELayer:
    config = TopKConfig(**{"balance_coef": 0.5, "z_coef": 0.1} | router)
    own = TopKRouter(config, WIDTH, EXPERTS)
    own.reset_parameters(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(own.weight_ED, generator=torch.Generator().manual_seed(1))
    context = LayerContext(RouterContext(), 0)
    return MoELayer(own, LocalDispatcher(), make_experts(True, torch.float32), context)


def test_a_routing_becomes_a_map() -> None:
    routing = Routing(
        expert_ids_TK=torch.tensor([[2, 0], [1, 99], [1, 1]]),
        weights_TK=torch.tensor([[0.75, 0.25], [1.0, 7.0], [0.5, 0.25]], requires_grad=True),
        num_experts=3,
        slot_mask_TK=torch.tensor([[True, True], [True, False], [True, True]]),
    )
    weights_TE, map_TE = as_map(routing)
    # The unused slot of the second token is nowhere; the third names an expert twice, and gets the sum.
    assert weights_TE.tolist() == [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.0, 0.75, 0.0]]
    assert map_TE.tolist() == [[True, False, True], [False, True, False], [False, True, False]]
    weights_TE.square().sum().backward()
    # Twice the weight where it is alone, twice the sum for both of a pair, nothing for an unused slot.
    grad = routing.weights_TK.grad
    assert grad is not None and grad.tolist() == [[1.5, 0.5], [2.0, 0.0], [1.5, 1.5]]


def _through_megatron(layer: MoELayer, x_SBD: torch.Tensor) -> torch.Tensor:
    """What Megatron does with the two slots on one rank: permute, compute, add up."""
    probs_TE, map_TE = RouterSlot(layer).train()(x_SBD, None)
    x_TD = x_SBD.flatten(0, 1)
    expert_R, token_R = map_TE.t().nonzero(as_tuple=True)
    slot = ExpertsSlot(layer.router.num_experts, None, layer)
    rows_RD, bias = slot(x_TD[token_R], map_TE.sum(0), probs_TE.t()[map_TE.t()])
    assert bias is None
    slot.backward_dw()
    return torch.zeros_like(x_TD).index_add(0, token_R, rows_RD).view_as(x_SBD)


def test_both_slots_together_are_our_layer() -> None:
    ours, theirs = _layer(), _layer()
    x_BSD = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    inputs = [x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()]
    for layer, x in zip((ours, theirs), inputs, strict=True):
        layer.context.run.loss_scale = 0.25
        layer.context.run.token_ids = torch.zeros(2, 5, dtype=torch.int64)
        # One token is padding: the balance losses and the statistics must not see it.
        layer.context.run.padding_mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
        out = layer(x) if layer is ours else _through_megatron(layer, x.transpose(0, 1)).transpose(0, 1)
        (out.square().mean() * 0.25).backward()
        torch.testing.assert_close(out, ours(x.detach()).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-7)
    for (name, mine), (_, its) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert torch.equal(theirs.stats.sums[0], ours.stats.sums[0])
    assert theirs.stats.losses[0] == ours.stats.losses[0]


@pytest.mark.parametrize(
    "config",
    [
        config
        for name, kind in router_classes().items()
        for config in (kind.config_class(), *router_case(name).variants)
    ],
    ids=label,
)
def test_every_router_goes_through_or_is_refused(config: RouterConfig) -> None:
    if MegatronConfig().check_moe(4, config):
        return
    ours, theirs = make_layer(config).train(), make_layer(config).train()
    x_BSD = torch.randn(2, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # The host tells of a batch what our layer's hook tells of it.
    _tell_batch(theirs, (x_BSD,))
    torch.manual_seed(0)
    wanted = ours(x_BSD)
    torch.manual_seed(0)
    found = _through_megatron(theirs, x_BSD.transpose(0, 1)).transpose(0, 1)
    if theirs.shared is not None:
        found = found + SharedSlot(theirs)(x_BSD)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(theirs.stats.sums[0], ours.stats.sums[0])
    # Of many experts DeepEP sends to those of the largest weights: none may be below that of one not chosen.
    many = MegatronConfig(dispatcher="deepep").check_moe(64, config)
    signed = (as_map(theirs.router(x_BSD.flatten(0, 1), theirs.context))[0] < 0).any()
    assert not signed or "gives negative ones" in str(many), config


def test_a_cut_sequence_is_routed_whole_and_each_rank_keeps_its_own() -> None:
    layer = _layer()
    x_SBD = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(2))
    whole = RouterSlot(layer).eval()(x_SBD)
    parts = [
        RouterSlot(layer, 2, rank, lambda part: x_SBD).eval()(x_SBD[2 * rank : 2 * rank + 2])
        for rank in (0, 1)
    ]
    for either in (0, 1):
        assert torch.equal(torch.cat([part[either] for part in parts]), whole[either])


def test_a_token_with_more_experts_than_can_be_sent_to_is_refused() -> None:
    x_SBD = torch.ones(3, 2, WIDTH)
    RouterSlot(_layer(), most=2)(x_SBD)
    told = r"engine\.dispatcher='deepep': it sends a token to 1 experts at most, and router=topk named 2"
    with pytest.raises(ConfigError, match=told):
        RouterSlot(_layer(), most=1)(x_SBD)


@dataclass
class _Spec:
    """As ``ModuleSpec`` of megatron-core up to 0.16: what to build, and with what."""

    module: type
    params: dict[str, Any]
    submodules: Any = None


def test_experts_fit_both_shapes_of_the_slot() -> None:
    layer, groups = _layer(), SimpleNamespace()
    spec = slot_of(ExpertsSlot, (0, 16, 1), _Spec, {"layer": layer})
    assert isinstance(spec, _Spec)
    # Up to 0.16: the spec's own parameters, and the process groups by keyword.
    old = spec.module(EXPERTS, None, **spec.params, pg_collection=groups)
    # From 0.17 on what is in the slot is called.
    new = slot_of(ExpertsSlot, (0, 17, 0), _Spec, {"layer": layer})(
        EXPERTS, None, pg_collection=groups, name="experts"
    )
    for slot in (old, new):
        assert isinstance(slot, ExpertsSlot) and slot.experts is layer.experts
    with pytest.raises(AssertionError, match="holds 8 experts, Megatron gives this rank 4"):
        slot_of(ExpertsSlot, (0, 19), _Spec, {"layer": layer})(4, None)
    # Megatron's own, which are made of submodules.
    theirs = SimpleNamespace(linear_fc1="up")
    assert slot_of(dict, (0, 16, 1), _Spec, {}, theirs) == _Spec(dict, {}, theirs)  # type: ignore[comparison-overlap]
    assert slot_of(dict, (0, 17, 0), _Spec, {}, theirs)(count=4) == {"submodules": theirs, "count": 4}


def test_a_shared_expert_stands_in_its_slot() -> None:
    layer = _layer()
    layer.shared = torch.nn.Linear(WIDTH, WIDTH)  # type: ignore[assignment]
    x_SBD = torch.ones(3, 2, WIDTH)
    assert torch.equal(SharedSlot(layer)(x_SBD), layer.shared(x_SBD))  # type: ignore[misc]


@pytest.mark.parametrize("hides", [False, True])
def test_attention_is_what_its_definition_says(hides: bool) -> None:
    S, B, H, G, C = 5, 2, 4, 2, 3
    draws = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(S, B, heads, C, generator=draws) for heads in (H, G, G))
    hidden_B1SS = torch.ones(S, S).triu(1).bool().expand(B, 1, S, S).clone()
    hidden_B1SS[1, 0, 3:, :3] = hides  # two conversations in the second sample
    out = Attention(SimpleNamespace(attention_dropout=0.0)).eval()(q, k, v, hidden_B1SS if hides else None)
    wanted = torch.empty(S, B, H, C)
    for sample in range(B):
        for head in range(H):
            group = head // (H // G)
            scores_SS = q[:, sample, head] @ k[:, sample, group].t() / C**0.5
            weights_SS = F.softmax(scores_SS.masked_fill(hidden_B1SS[sample, 0], -torch.inf), -1)
            wanted[:, sample, head] = weights_SS @ v[:, sample, group]
    torch.testing.assert_close(out, wanted.flatten(2), rtol=1e-5, atol=1e-6)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"model_type": "gemma2"}, "takes the families .*qwen3_moe, not gemma2"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rotary embeddings are of the kind llama3",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of the kind yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns 0.5 of each head alone"),
        ({"attention_bias": True}, "it has biases"),
        ({"mlp_bias": True}, "it has biases"),
        ({"hidden_act": "gelu"}, "its networks use gelu"),
        ({"model_type": "mistral", "sliding_window": 16}, "looks back 16 tokens, and .* at all 32"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "looks back 8 tokens"),
    ],
)
def test_a_decoder_that_computes_something_else_is_refused(more: dict[str, Any], match: str) -> None:
    (mistake,) = family_mistakes(LLAMA | more, "folder", 32)
    assert mistake.path == "dense"
    assert re.search(match, str(mistake)), mistake


def test_a_decoder_that_fits_is_read() -> None:
    for more in (
        {},
        {"model_type": "mistral", "sliding_window": 32},
        {"model_type": "qwen2", "sliding_window": 8},
    ):
        assert family_mistakes(LLAMA | more, "folder", 32) == []
    shape = read_shape(LLAMA | {"rope_theta": 5e5, "tie_word_embeddings": True})
    assert (shape.theta, shape.head_dim, shape.tied, shape.qkv_bias, shape.qk_norm) == (
        5e5,
        8,
        True,
        False,
        False,
    )
    assert read_shape(LLAMA | {"model_type": "qwen3"}).head_dim == 128  # what transformers takes without one
    assert split_mistakes(LLAMA, 2) == []
    wrong = " ".join(str(mistake) for mistake in split_mistakes(LLAMA | {"vocab_size": 63}, 4))
    assert "2 key-value heads do not divide" in wrong and "63 entries of the vocabulary" in wrong


def test_what_megatron_does_not_do_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = MegatronConfig(tensor_parallel=2, device="cpu")
    assert MegatronEngine.check(config) is None
    unsupported_reason = MegatronEngine.check(replace(config, tensor_parallel=3))
    assert str(unsupported_reason).startswith("tensor_parallel=3: 4 ranks do not divide into groups")
    staged = replace(config, pipeline_parallel=2)
    assert MegatronEngine.check(staged) is None
    for wrong, told in (
        ({"pipeline_parallel": 3}, "pipeline_parallel=3: 4 ranks do not divide into stages"),
        (
            {"tensor_parallel": 4},
            "tensor_parallel=4: the 2 ranks of each of 2 stages do not divide into groups of 4. "
            "Set a divisor of 2, or start a multiple of 8 ranks",
        ),
        ({"expert_parallel": 4}, "expert_parallel=4: the 2 ranks of each of 2 stages do not divide"),
    ):
        unsupported_reason = MegatronEngine.check(replace(staged, **wrong))  # type: ignore[arg-type]
        assert str(unsupported_reason).startswith(told), unsupported_reason
    mixed = config.check_moe(8, SoftMoEConfig())
    reads = config.check_moe(8, AvgKConfig())
    assert "its experts see mixtures of tokens" in str(mixed) and "it reads the weights of" in str(reads)
    assert config.check_moe(8, TopKConfig()) == []
    assert "has AdamW alone" in str(config.check_optimizer(OptimConfig(name="muon")))
    for wrong, match in (
        ({"tensor_parallel": 0}, "tensor_parallel=0: must be at least 1"),
        ({"tensor_parallel": 2, "sequence_parallel": False}, "sequence_parallel=False: must be true"),
        ({"pipeline_parallel": 0}, "pipeline_parallel=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            MegatronConfig(**wrong)  # type: ignore[arg-type]


def test_the_rest_of_the_run_must_fit() -> None:
    overrides = ["+recipe=upcycle", "engine=megatron", "engine.tensor_parallel=3", "attention=moe"]
    overrides.append("engine.pipeline_parallel=5")
    run = parse_config(compose_config([*overrides, "data.seq_len=128"]))
    assert isinstance(run.engine, MegatronConfig)
    told = " ".join(str(mistake) for mistake in MegatronEngine.check_run(run.engine, run))
    for part in (
        "attention='moe'",
        "4 attention heads",
        "2048 entries of the vocabulary",
        "samples of 128 tokens",
        "engine.pipeline_parallel=5: the dense model's 4 blocks are fewer than 5 stages",
    ):
        assert part in told, part


def test_blocks_are_spread_over_stages_in_order() -> None:
    assert blocks_of_stages(4, 2) == [range(0, 2), range(2, 4)]
    # The last stage has the head as well.
    assert blocks_of_stages(5, 3) == [range(0, 2), range(2, 4), range(4, 5)]
    assert megatron_layout(3, 1) is None
    assert megatron_layout(3, 2) == [["embedding", "decoder", "decoder"], ["decoder", "loss"]]
    for blocks, stages in ((7, 3), (8, 3), (3, 3)):
        every = [block for held in blocks_of_stages(blocks, stages) for block in held]
        assert every == list(range(blocks)), (blocks, stages)


def test_a_rank_of_a_later_stage_sees_the_samples_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    engine = MegatronEngine(MegatronConfig(tensor_parallel=2, pipeline_parallel=2, device="cpu"))
    seen = []
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        seen.append(engine.data_rank)
    assert (seen, engine.data_ranks) == ([0, 0, 1, 1, 0, 0, 1, 1], 2)


def test_nobody_imports_megatron_before_the_engine_opens() -> None:
    modules = ("megatron_engine", "megatron_train_module")
    code = f"import sys, {', '.join(f'recipes.engines.megatron.{name}' for name in modules)}; "
    code += "sys.exit(any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
