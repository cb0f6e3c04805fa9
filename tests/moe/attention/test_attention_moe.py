"""Attention experts against a token-by-token loop, in passes, with padding, and what a config says of them.

Letters: B sequences, S positions, T tokens, D model width, E experts, G query heads of an expert, H head
width, Q = G H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.attention.attention_config import AttentionConfig
from moe.attention.attention_memory import KeyMemory
from moe.attention.attention_rules import attention_scale, counts_all_once, router_mistakes
from moe.attention.routed_attention import AttentionContext, AttentionMoE, AttentionWeights, attention_layers
from moe.routers import router_class
from moe.routers.configs import RouterConfig
from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.types import RouterContext

B, S, D, E, G, H = 2, 7, 12, 4, 2, 6


def random_weights(seed: int = 0, *, biases: bool = True) -> AttentionWeights:
    """Of E heads with G query heads each, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    dense = (draw(E * G * H, D), draw(E * H, D), draw(E * H, D), draw(D, E * G * H))
    vectors = (draw(E * G * H), draw(E * H), draw(E * H), draw(D)) if biases else (None,) * 4
    return AttentionWeights.cut(E, dense, *vectors)


def make_layer(top_k: int = 2, context: RouterContext | None = None, **options: Any) -> AttentionMoE:
    """With decided routing, in fp64."""
    router = TopKRouter(TopKConfig(top_k=top_k, init_std=1.0), D, E)
    router.reset_parameters(torch.Generator().manual_seed(1))
    run = AttentionContext(context or RouterContext(), 0)
    layer = AttentionMoE(router, random_weights(**options), run, scale=1.5, norms=(_norm(2), _norm(3)))
    return layer.double()


def _norm(seed: int) -> nn.Module:
    norm = nn.RMSNorm(H)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(H, generator=torch.Generator().manual_seed(seed)) + 0.5)
    return norm


def random_tokens(num: int = S) -> Tensor:
    """``[B, S, D]``."""
    return torch.randn(B, num, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def rotary(start: int = 0, num: int = S) -> tuple[Tensor, Tensor]:
    """``[1, S, H]`` of the positions from ``start`` on."""
    angle_SF = torch.arange(start, start + num).double()[:, None] / 10.0 ** torch.arange(H // 2)
    angle_1SH = torch.cat([angle_SF, angle_SF], -1)[None]
    return angle_1SH.cos(), angle_1SH.sin()


def slow_attention(layer: AttentionMoE, x_BSD: Tensor, visible_BSS: Tensor) -> Tensor:
    """Every query head of every expert of every token by itself."""
    experts, (cos, sin) = layer.experts, rotary(num=x_BSD.shape[1])
    routing = layer.router(x_BSD.reshape(-1, D), layer.context)
    ids = routing.expert_ids_TK.view(*x_BSD.shape[:2], -1)
    weights = routing.weights_TK.view(*x_BSD.shape[:2], -1)

    def turned(vector_H: Tensor, position: int) -> Tensor:
        turned_by_90 = torch.cat([-vector_H[H // 2 :], vector_H[: H // 2]])
        return vector_H * cos[0, position] + turned_by_90 * sin[0, position]

    def head(stack: Tensor, bias: Tensor | None, e: int, x_D: Tensor) -> Tensor:
        return stack[e] @ x_D + (0 if bias is None else bias[e])

    sequences = []
    for b in range(x_BSD.shape[0]):
        for s in range(x_BSD.shape[1]):
            out_D = torch.zeros(D, dtype=torch.float64) if layer.b_o_D is None else layer.b_o_D
            for e, weight in zip(ids[b, s].tolist(), weights[b, s], strict=True):
                seen = [p for p in range(s + 1) if visible_BSS[b, s, p] and e in ids[b, p].tolist()]
                query_GH = head(experts.w_q_EQD, experts.b_q_EQ, e, x_BSD[b, s]).view(G, H)
                attended = []
                for query_H in query_GH:
                    query_H = turned(layer.q_norm(query_H), s)
                    keys = [head(experts.w_k_EHD, experts.b_k_EH, e, x_BSD[b, p]) for p in seen]
                    logits = torch.stack(
                        [query_H @ turned(layer.k_norm(k), p) for k, p in zip(keys, seen, strict=True)]
                    )
                    shares = (logits / math.sqrt(H)).softmax(0)
                    values = [head(experts.w_v_EHD, experts.b_v_EH, e, x_BSD[b, p]) for p in seen]
                    attended.append(sum(share * value for share, value in zip(shares, values, strict=True)))
                out_D = out_D + layer.scale * weight * (experts.w_o_EDQ[e] @ torch.cat(attended))
            sequences.append(out_D)
    return torch.stack(sequences).view_as(x_BSD)


def windowed(window: int) -> Tensor:
    """``[B, S, S]`` bool: so many positions back, itself included; two of sequence 0 are padding."""
    position = torch.arange(S)
    seen = (position[None] <= position[:, None]) & (position[None] > position[:, None] - window)
    seen_BSS = seen.expand(B, -1, -1).clone()
    seen_BSS[0, :, :2] = False
    return seen_BSS


@pytest.mark.parametrize("kind", ["causal", "bool mask", "added mask"])
@pytest.mark.parametrize("biases", [True, False])
def test_it_is_the_loop_over_tokens_with_gradients(kind: str, biases: bool) -> None:
    layer, x_BSD = make_layer(biases=biases), random_tokens().requires_grad_()
    seen_BSS, mask = torch.ones(B, S, S).tril().bool(), None
    real_BS1 = torch.ones(B, S, 1, dtype=torch.float64)
    if kind != "causal":
        seen_BSS = windowed(3)
        real_BS1[0, :2] = 0
        mask = seen_BSS[:, None]
    if kind == "added mask":
        mask = torch.zeros(B, 1, S, S, dtype=torch.float64).masked_fill(~seen_BSS[:, None], -1e300)
    # What padding attends to is nobody's business.
    slow_seen = seen_BSS | torch.eye(S, dtype=torch.bool)
    outs = [layer(x_BSD, rotary(), mask), slow_attention(layer, x_BSD, slow_seen)]
    # The smallest weight of a mask that is added is no 0: what hides behind it must not matter either.
    torch.testing.assert_close(outs[0] * real_BS1, outs[1] * real_BS1, rtol=1e-11, atol=1e-11)
    named = dict(layer.named_parameters()) | {"x": x_BSD}
    probe = torch.randn(B, S, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * real_BS1
    layer.eval()  # the balance losses have a test of their own
    found = []
    for out in (layer(x_BSD, rotary(), mask), slow_attention(layer, x_BSD, slow_seen)):
        grads = torch.autograd.grad((out * probe).sum(), list(named.values()))
        found.append(dict(zip(named, grads, strict=True)))
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-10, atol=1e-10, msg=name)


def test_three_tokens_worked_by_hand() -> None:
    # One number a token: 1, 2, 3. Queries are 0, so that every visible key gets the same share; values are
    # the tokens, and the experts put out 1 and 10 times what they gather.
    one = torch.ones(2, 1, 1)
    weights = AttentionWeights(0 * one, one, one, torch.tensor([1.0, 10.0]).view(2, 1, 1))
    layer = AttentionMoE(TopKRouter(TopKConfig(), 1, 2), weights, AttentionContext(RouterContext(), 0))
    chosen_TE = torch.tensor([[True, False], [False, True], [True, True]])
    weights_TE = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 0.1]])
    out = layer.attend(torch.tensor([[[1.0], [2.0], [3.0]]]), weights_TE, chosen_TE, None)
    # Token 0 sees itself in expert 0: 1. Token 1 itself in expert 1: 10 * 2 * 0.5 = 10. Token 2 sees 1 and 3
    # in expert 0, mean 2, and 2 and 3 in expert 1, mean 2.5: 2 + 10 * 2.5 * 0.1 = 4.5.
    assert out.flatten().tolist() == pytest.approx([1.0, 10.0, 4.5])


def dense_attention(layer: AttentionMoE, x_BSD: Tensor) -> Tensor:
    """Plain torch with the projections put together again; without norms and rotary embedding."""
    experts = layer.experts
    stacks = (experts.w_q_EQD, experts.w_k_EHD, experts.w_v_EHD)
    biases = (experts.b_q_EQ, experts.b_k_EH, experts.b_v_EH)
    query, key, value = (
        nn.functional.linear(x_BSD, stack.flatten(0, 1), bias.flatten()).view(B, S, -1, H).transpose(1, 2)
        for stack, bias in zip(stacks, biases, strict=True)
    )
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    output_DQ = experts.w_o_EDQ.transpose(0, 1).flatten(1)
    return nn.functional.linear(out.transpose(1, 2).flatten(2), output_DQ, layer.b_o_D)


def plain_layer() -> AttentionMoE:
    """Without norms and factor."""
    layer = make_layer()
    layer.q_norm = layer.k_norm = None
    layer.scale = 1.0
    return layer


def test_all_experts_at_one_are_dense_attention() -> None:
    layer, x_BSD = plain_layer(), random_tokens()
    ones_TE = torch.ones(B * S, E, dtype=torch.float64)
    routed = layer.attend(x_BSD, ones_TE, ones_TE > 0, None)
    torch.testing.assert_close(routed, dense_attention(layer, x_BSD), rtol=1e-12, atol=1e-12)


def test_bf16_is_as_near_as_that_of_plain_torch() -> None:
    layer, x_BSD = plain_layer().float(), random_tokens().float()
    ones_TE = torch.ones(B * S, E)
    probe = torch.randn(B, S, D, generator=torch.Generator().manual_seed(5))
    named = {name: p for name, p in layer.named_parameters() if "router" not in name}

    def found(attention: Callable[[], Tensor], low: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = attention()
        grads = torch.autograd.grad((out.float() * probe).sum(), list(named.values()))
        return {"out": out.detach().float()} | dict(zip(named, grads, strict=True))

    exact = found(lambda: dense_attention(layer, x_BSD), low=False)
    plain = found(lambda: dense_attention(layer, x_BSD), low=True)
    ours = found(lambda: layer.attend(x_BSD, ones_TE, ones_TE > 0, None), low=True)
    for name, value in exact.items():
        allowed = 2 * (plain[name] - value).norm() / value.norm()
        # The bias of the output is added in fp32 here.
        assert (ours[name] - value).norm() / value.norm() <= max(allowed, 2.0**-8), name


@pytest.mark.parametrize("cuts", [(3, 4), (1, 1, 1, 1, 1, 1, 1), (6, 1)])
def test_passes_with_memory_are_one_pass(cuts: tuple[int, ...]) -> None:
    layer, x_BSD = make_layer().eval(), random_tokens()
    whole = layer(x_BSD, rotary())
    memory, parts, start = KeyMemory(), [], 0
    for num in cuts:
        parts.append(layer(x_BSD[:, start : start + num], rotary(start, num), None, memory))
        start += num
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    ids = layer.router(x_BSD.reshape(-1, D), layer.context).expert_ids_TK.view(B, -1)
    # Kept is what was routed, and padding up to the longer of the two sequences.
    counts_BE = torch.stack([ids_K.bincount(minlength=E) for ids_K in ids])
    assert counts_BE.sum() == 2 * B * S
    assert memory.num_rows == B * int(counts_BE.amax(0).sum())
    assert {e: found.count_B.tolist() for e, found in memory.experts.items()} == {
        e: counts_BE[:, e].tolist() for e in range(E) if counts_BE[:, e].any()
    }


def test_one_sequence_is_remembered_without_padding() -> None:
    layer = make_layer().eval()
    memory = KeyMemory()
    layer(random_tokens()[:1], rotary(), None, memory)
    assert memory.num_rows == 2 * S  # of 4 heads, two a token


def test_a_window_forgets_and_masks_count_from_its_first_position() -> None:
    layer, x_BSD = make_layer().eval(), random_tokens()
    position = torch.arange(S)
    seen = (position[None] <= position[:, None]) & (position[None] > position[:, None] - 3)
    whole = layer(x_BSD, rotary(), seen[None, None])
    memory, outs = KeyMemory(window=3), []
    for s in range(S):
        first = max(s - 2, 0)
        mask = seen[None, None, s : s + 1, first : s + 1]
        outs.append(layer(x_BSD[:, s : s + 1], rotary(s, 1), mask, memory))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-12, atol=1e-12)
    # The next query, at 7, sees itself and what is left of 5 and 6.
    left = [position for found in memory.experts.values() for position in found.position_BM[found.real_BM]]
    assert left and all(position >= 5 for position in left)


def test_memory_goes_back_and_takes_other_sequences() -> None:
    layer, x_BSD = make_layer().eval(), random_tokens()
    memory = KeyMemory()
    layer(x_BSD, rotary(), None, memory)
    memory.crop(4)
    memory.take(torch.tensor([1, 1, 0]))
    order = torch.tensor([1, 1, 0])
    again = layer(x_BSD[order, 4:], rotary(4, 3), None, memory)
    torch.testing.assert_close(again, layer(x_BSD, rotary())[order, 4:], rtol=1e-12, atol=1e-12)


def test_padding_goes_to_no_expert() -> None:
    real_BS = torch.ones(B, S, dtype=torch.bool)
    real_BS[0, :3] = False
    layer = make_layer(context=RouterContext(padding_mask=real_BS))
    memory = KeyMemory()
    out = layer(random_tokens(), rotary(), None, memory)
    assert out.isfinite().all()
    assert sum(int(found.count_B[0]) for found in memory.experts.values()) == 2 * (S - 3)
    # E counts, E sums of probabilities, then tokens: those that are real.
    assert layer.stats.sums[0][2 * E] == B * S - 3


def test_balance_losses_get_their_gradient_and_recomputation_changes_nothing() -> None:
    x_BSD = random_tokens()
    grads = []
    for recompute in (False, True):
        layer = make_layer(context=RouterContext(loss_scale=0.5))
        out = checkpoint(layer, x_BSD, rotary(), use_reentrant=False) if recompute else layer(x_BSD, rotary())
        (0.5 * out.square().mean()).backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
        assert list(layer.stats.sums) == [0] and layer.stats.sums[0][:E].sum() == 2 * B * S
        assert "balance_loss" in layer.stats.losses[0]
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
    layer = make_layer()
    routing = layer.router(x_BSD.reshape(-1, D), layer.context)
    total = 0.5 * sum(routing.losses.values()) + 0.5 * layer.eval()(x_BSD, rotary()).square().mean()
    total.backward()
    torch.testing.assert_close(grads[0]["router.weight_ED"], layer.router.weight_ED.grad)


def test_a_schedule_of_k_is_not_for_attention() -> None:
    run = RouterContext(top_k={0: 4})
    layer = make_layer(context=run).eval()
    assert layer.context.top_k(2) == 2
    memory = KeyMemory()
    layer(random_tokens()[:1], rotary(), None, memory)
    assert memory.num_rows == 2 * S


def test_layers_are_found_with_their_names() -> None:
    first, second = make_layer(), make_layer()
    model = nn.ModuleDict({"b": nn.ModuleList([nn.Identity(), first]), "a": second})
    assert attention_layers(model) == [("b.1", first), ("a", second)]


@pytest.mark.parametrize(
    ("router", "scale"),
    [
        (TopKConfig(top_k=3), 3.0),  # weights sum to 1
        (TopKConfig(top_k=3, renormalise=False), 4.0),  # each about 1 / E
        (OnePlusConfig(top_k=3), 1.0),  # each 1
        (TopKConfig(top_k=2, score="sigmoid"), 2.0),
    ],
)
def test_heads_count_one_on_average(router: RouterConfig, scale: float) -> None:
    assert attention_scale(AttentionConfig(router=router), 4) == pytest.approx(scale)
    assert attention_scale(AttentionConfig(router=router, scale_factor=0.3), 4) == 0.3


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (OnePlusConfig(top_k=4), True),
        (OnePlusConfig(top_k=3), False),
        (TopKConfig(top_k=4), False),  # all heads, and weights that differ
    ],
)
def test_only_all_heads_at_one_are_exact(config: RouterConfig, exact: bool) -> None:
    router = router_class(config.name)(config, D, E)
    assert counts_all_once(router, attention_scale(AttentionConfig(router=config), E)) is exact
    assert not counts_all_once(router, 2.0)


@pytest.mark.parametrize(
    ("name", "options", "path"),
    [
        ("topk", {"top_k": 5}, "attention.router.top_k"),
        ("expert_choice", {}, "attention.router.name"),
        ("soft_moe", {}, "attention.router.name"),
        ("analytical", {}, "attention.router.name"),
        ("deepseek_v3", {"num_groups": 3}, "attention.router.num_groups"),
    ],
)
def test_routers_that_do_not_fit_are_named(name: str, options: dict[str, Any], path: str) -> None:
    cls = router_class(name)
    config = AttentionConfig(router=cls.config_class(name=name, **options))
    (mistake,) = config.check(4, 1) or router_mistakes(config, cls, 4)
    assert mistake.path == path


def test_a_config_is_checked() -> None:
    with pytest.raises(ValueError, match="scale_factor=0"):
        AttentionConfig(router=TopKConfig(), scale_factor=0)
    with pytest.raises(ValueError, match="none of the known forms"):
        AttentionConfig(router=TopKConfig(), layers="some")
