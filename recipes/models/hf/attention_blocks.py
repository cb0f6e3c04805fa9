"""Replaces the attention of a transformers decoder by attention experts.

Families are listed, since weights do not show what an attention computes besides its projections. Each
replaced attention is nevertheless compared with the module itself.

Letters: B sequences, S positions, T tokens, D model width, E experts (key-value heads).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.attention.attention_config import AttentionConfig
from moe.attention.attention_rules import attention_scale, counts_all_once, router_mistakes
from moe.attention.routed_attention import AttentionContext, AttentionMoE, AttentionWeights
from moe.errors import ConfigError, Mistake, ModelError
from moe.routers import router_class
from moe.routers.base import Router
from moe.routing.draws import seeded_generator
from moe.upcycle.equivalence import (
    TOLERANCES,
    LayerDrift,
    LogitDrift,
    layer_drift,
    logit_drift,
    require_exact,
)
from recipes.models.hf.attention_options import key_value_heads, option_mistakes
from recipes.models.hf.drift import comparing
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel

# Implementations that pass masks to the layer; with others, windows and padding would be lost.
_IMPLEMENTATIONS = ("sdpa", "eager")
_SITE = "self_attn"


def attention_mistakes(config: AttentionConfig, dense: Mapping[str, Any]) -> list[Mistake]:
    """Checks from options and ``config.json`` that a model's attention can become experts.

    Args:
        config: The requested attention experts.
        dense: The content of the file.
    """
    if found := option_mistakes(config, dense):
        return found
    return router_mistakes(config, router_class(config.router.name), key_value_heads(dense))


class RoutedSelfAttention(AttentionMoE):
    """`AttentionMoE` with the signature that decoder blocks of transformers call.

    Attributes:
        layer: Index of the block.
        model_config: The decoder's config, which says how masks are made.
    """

    def __init__(self, dense: Any, router: Router[Any], context: AttentionContext, scale: float) -> None:
        """Takes over the weights of a dense attention.

        Args:
            dense: transformers' module.
            router: Router over its key-value heads.
            context: Context of the layer.
            scale: See `AttentionMoE`.
        """
        norms = (getattr(dense, "q_norm", None), getattr(dense, "k_norm", None))
        weights = read_attention(dense)
        super().__init__(router, weights, context, scale=scale, norms=norms, dropout=dense.attention_dropout)
        self.layer = context.layer_index
        self.model_config = dense.config

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Computes what transformers' own module does, without returning attention probabilities.

        Raises:
            ModelError: The attention implementation passes no masks, or the cache cannot hold experts.
        """
        self._require_masks(attention_mask)
        memory = None
        if past_key_values is not None:
            from recipes.models.hf.attention_cache import memory_of

            memory = memory_of(past_key_values, self.layer)
        return super().forward(hidden_states, position_embeddings, attention_mask, memory), None

    def _require_masks(self, mask: Tensor | None) -> None:
        found = self.model_config._attn_implementation
        if found in _IMPLEMENTATIONS and (mask is None or mask.dim() == 4):
            return
        rule = "attention experts need masks as sdpa and eager are given"
        remedy = "Load the model with attn_implementation='sdpa'."
        raise ModelError.one("attn_implementation", found, rule, remedy)


def read_attention(dense: Any) -> AttentionWeights:
    """Splits the weights of transformers' module into experts, which share its memory where possible."""
    projections = (dense.q_proj, dense.k_proj, dense.v_proj, dense.o_proj)
    num_experts = dense.k_proj.out_features // dense.head_dim
    biases = [None if linear.bias is None else linear.bias.detach() for linear in projections]
    query, key, value, output = (linear.weight.detach() for linear in projections)
    return AttentionWeights.cut(num_experts, (query, key, value, output), *biases)


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model.

    Attributes:
        layer: Index of its block.
        block: The block.
        dense: transformers' module.
    """

    layer: int
    block: nn.Module
    dense: nn.Module

    def replace(self, routed: RoutedSelfAttention) -> None:
        """Replaces it by experts."""
        setattr(self.block, _SITE, routed)


def attention_sites(model: HFModel, layers: Sequence[int]) -> list[AttentionSite]:
    """Returns the dense attention of some blocks."""
    blocks = decoder_blocks(model.module, model.config)
    return [AttentionSite(i, blocks[i], blocks[i].get_submodule(_SITE)) for i in layers]


@dataclass(frozen=True)
class AttentionReport:
    """Outcome of the surgery on attention, and how exact it is.

    Attributes:
        layers: Indices of the blocks whose attention became experts.
        num_experts: E.
        top_k: Experts per token.
        scale: Factor of the router's weights.
        claimed_exact: Whether each token uses all experts with weight 1.
        logits: Drift of the logits on real tokens from those before the surgery.
        drifts: Drift of each layer on its own.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    scale: float
    claimed_exact: bool
    logits: LogitDrift
    drifts: tuple[LayerDrift, ...]


def describe_attention(report: AttentionReport) -> str:
    """Describes the surgery in a line."""
    worst = max(report.drifts, key=lambda drift: drift.relative_error)
    drift = "exact"
    if not report.claimed_exact:
        drift = (
            f"KL {report.logits.kl:.2e}, not exact; layer {worst.layer} drifts most, relative error "
            f"{worst.relative_error:.2f}, gain {worst.gain:.2f}"
        )
    return (
        f"attention: {report.top_k} of {report.num_experts} key-value heads per token in layers "
        f"{list(report.layers)}, weights times {report.scale:g}; logits differ from those before by "
        f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest): {drift}. FLOPs are not "
        "counted: which keys a query meets depends on the text"
    )


def summarise_attention(report: AttentionReport) -> dict[str, Any]:
    """Returns the report for ``summary.json``."""
    return json.loads(json.dumps(asdict(report)))  # type: ignore[no-any-return]


def swap_attention(
    model: HFModel, config: AttentionConfig, seed: int, *, verify: bool = True
) -> list[tuple[AttentionSite, RoutedSelfAttention]]:
    """Replaces the attention of the chosen layers by experts; returns them with their sites.

    Args:
        model: Changed in place; it may have MoE layers already.
        config: The requested attention experts.
        seed: Seed of the routers' weights.
        verify: Whether to compare with the dense attention; False for a model without weights.

    Raises:
        ConfigError: The model or the router does not fit.
        ModelError: An attention computes something else than its family suggests.
    """
    if mistakes := attention_mistakes(config, model.config.to_dict()):
        raise ConfigError(mistakes)
    cls = router_class(config.router.name)
    layers = config.layer_choice.pick(len(decoder_blocks(model.module, model.config)))
    swapped = []
    for site in attention_sites(model, layers):
        weights = read_attention(site.dense)
        router = cls(config.router, weights.w_q_EQD.shape[2], len(weights.w_q_EQD))
        router.reset_parameters(seeded_generator(seed, "attention router", site.layer))
        scale = attention_scale(config, router.num_experts)
        routed = RoutedSelfAttention(site.dense, router, AttentionContext(model.context, site.layer), scale)
        if verify:
            _verify(model, site, routed)
        site.replace(routed)
        swapped.append((site, routed))
    return swapped


@torch.no_grad()
def upcycle_attention(
    model: HFModel, config: AttentionConfig, seed: int, tokens_BS: Tensor
) -> AttentionReport:
    """Turns a model's attention into experts and measures whether it still computes the same.

    Args:
        model: Changed in place.
        config: The requested attention experts.
        seed: Seed of the routers' weights.
        tokens_BS: ``[B, S]`` real tokens.

    Raises:
        ConfigError: See `swap_attention`.
        ExactnessError: All heads have weight 1, and the logits differ.
    """
    model.module.eval()
    before = model.module(input_ids=tokens_BS).logits
    swapped = swap_attention(model, config, seed)
    model.module.eval()
    drifts: list[LayerDrift] = []
    layers = [(site.layer, routed, partial(_dense_output, site)) for site, routed in swapped]
    with comparing(layers, drifts):
        after = model.module(input_ids=tokens_BS).logits
    first = swapped[0][1]
    exact = all(counts_all_once(routed.router, routed.scale) for _, routed in swapped)
    logits = logit_drift(before, after)
    if exact:
        require_exact("attention=moe", logits, drifts, after.dtype)
    return AttentionReport(
        layers=tuple(site.layer for site, _ in swapped),
        num_experts=first.experts.num_experts,
        top_k=first.router.top_k,
        scale=first.scale,
        claimed_exact=exact,
        logits=logits,
        drifts=tuple(drifts),
    )


def _dense_output(site: AttentionSite, *args: Any, **kwargs: Any) -> Tensor:
    # The pass starts at the first token; the experts' cache is not for the dense module.
    out: Tensor = site.dense(*args, **kwargs | {"past_key_values": None})[0]
    return out


@torch.no_grad()
def _verify(model: HFModel, site: AttentionSite, routed: RoutedSelfAttention) -> None:
    """Compares the sum of all experts with the dense attention, on random input."""
    E, D = routed.experts.num_experts, routed.experts.w_q_EQD.shape[2]
    like = routed.experts.w_q_EQD
    x_1SD = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(0)).to(like)
    rotary = model.module.get_decoder().rotary_emb(x_1SD, torch.arange(8, device=like.device)[None])
    ones_TE = torch.full((8, E), 1 / routed.scale, device=like.device)
    training = routed.training
    ours = routed.eval().attend(x_1SD, ones_TE, ones_TE > 0, rotary)
    routed.train(training)
    training = site.dense.training
    mask = torch.ones(8, 8, dtype=torch.bool, device=like.device).tril()
    if model.config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
    theirs = site.dense.eval()(
        hidden_states=x_1SD, position_embeddings=rotary, attention_mask=mask[None, None]
    )[0]
    site.dense.train(training)
    drift = layer_drift(site.layer, theirs, ours)
    if not drift.max_relative <= TOLERANCES[like.dtype]:
        rule = (
            f"the attention of layer {site.layer} ({type(site.dense).__name__}) computes something else than "
            "projections, norms and rotary embedding say: outputs differ by "
            f"{drift.max_relative:.1e} of the largest"
        )
        raise ModelError.one("dense", model.config.model_type, rule, "Set attention=none for this model.")
