"""FLOPs per token under a named convention.

A multiplication with its addition is two FLOPs. A number depends on its convention, and so does the
utilisation of the same model at the same speed: always name the convention.

=================  ===================  ===================  ===================  ===================
                   ``exact``            ``palm``             ``torchtitan``       ``megatron``
=================  ===================  ===================  ===================  ===================
linear layers      matrices a token     all active           all active           matrices a token
                   meets                parameters           parameters           meets
norms and biases   no                   yes                  yes                  no
router             yes                  yes                  yes                  no
head               yes                  yes                  yes                  yes
embedding look-up  no                   as a matrix          no                   no
attention          keys that a query    all keys of the      all keys, at most    half of all keys,
                   can see: causal,     sequence             the window           windows ignored
                   windows, chunks
state-space scan   yes                  no                   no                   yes
layers for         no                   no                   no                   yes
further tokens
=================  ===================  ===================  ===================  ===================

None counts softmax, rotary embeddings, top-k or recomputation. Training counts as three forward passes.

``palm`` is ``6N + 12 L H Q T`` for training (A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B),
with N the active parameters, L layers, H heads, Q their width, T the sequence length. ``torchtitan`` is
``models/utils.py`` of pytorch/torchtitan at b5bcd76, with windows as of its pull request 4300. ``megatron``
is ``num_floating_point_operations`` of NVIDIA/Megatron-LM at d98e8a6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.layers import LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import Mixer, mean_context
from moe.accounting.params import ParameterCount, count_from_shape

__all__ = [
    "CONVENTIONS",
    "COUNTED",
    "TRAINING_FORWARDS",
    "Convention",
    "Flops",
    "all_experts",
    "flops_from_shape",
    "forward_flops_per_token",
    "mean_context",
    "training_flops_per_token",
]

Convention = Literal["exact", "palm", "torchtitan", "megatron"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

COUNTED: Mapping[Convention, str] = {
    "exact": "matrices a token meets, router and head included; keys it can see (causal, windows)",
    "palm": "all active parameters, embeddings included; all keys of the sequence",
    "torchtitan": "active parameters without the input embedding; all keys, at most the window",
    "megatron": "matrices without the router, layers for further tokens included; half of all keys",
}

# Forward, gradient of the inputs, gradient of the weights: three products of the same size.
TRAINING_FORWARDS = 3


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, averaged over the positions of a sequence."""

    forward: float

    @property
    def training(self) -> float:
        """FLOPs of forward and backward, without recomputation."""
        return TRAINING_FORWARDS * self.forward


def forward_flops_per_token(
    count: ParameterCount,
    attention: Sequence[Mixer],
    seq_len: int,
    convention: Convention = "exact",
) -> float:
    """Computes the FLOPs of a token's forward pass, averaged over the positions of a sequence.

    Layers that only predict further tokens are not included: see `flops_from_shape`.

    Args:
        count: Count of a live module or a shape.
        attention: Attention of every layer; see `moe.accounting.shape.attention_from_config`.
        seq_len: Tokens of a sequence. Documents packed into one count as one, as in the products.
        convention: See the module.

    Raises:
        ValueError: ``seq_len`` is below 1, or the convention is unknown.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be 1 or more.")
    scans = sum(mixer.scan_flops for mixer in attention)
    if convention == "exact":
        return 2 * count.matmul + scans + sum(_scores(mixer, mixer.mean_keys(seq_len)) for mixer in attention)
    if convention == "palm":
        return 2 * count.active + sum(_scores(mixer, seq_len) for mixer in attention)
    if convention == "torchtitan":
        seen = sum(_scores(mixer, mixer.most_keys(seq_len)) for mixer in attention)
        return 2 * count.active_without_input_embedding + seen
    if convention == "megatron":
        halved = sum(_scores(mixer, seq_len / 2) for mixer in attention)
        return 2 * (count.matmul - count.router) + scans + halved
    raise ValueError(f"convention={convention!r} is unknown. Choose one of {', '.join(CONVENTIONS)}.")


def training_flops_per_token(
    count: ParameterCount,
    attention: Sequence[Mixer],
    seq_len: int,
    convention: Convention = "exact",
) -> float:
    """Computes the FLOPs of a token's forward and backward pass, i.e. three forward passes.

    The product for the gradient of a frozen matrix is left out, under every convention. See
    `forward_flops_per_token`.
    """
    forward = forward_flops_per_token(count, attention, seq_len, convention)
    return TRAINING_FORWARDS * forward - 2 * count.frozen


def flops_from_shape(shape: ModelShape, seq_len: int, convention: Convention = "exact") -> Flops:
    """Computes the FLOPs of a token from the shape alone. See `forward_flops_per_token`."""
    count, further = count_from_shape(shape), 0.0
    if convention == "megatron" and shape.next_token_layers:
        further = shape.next_token_layers * _further_layer(shape, seq_len)
    return Flops(forward_flops_per_token(count, shape.attention, seq_len, convention) + further)


def _further_layer(shape: ModelShape, seq_len: int) -> float:
    """Computes the FLOPs of a layer like the last, after a projection of two hidden states, and the head."""
    alone = replace(shape, layers=shape.layers[-1:])
    one = forward_flops_per_token(count_from_shape(alone), alone.attention, seq_len, "megatron")
    return one + 2 * 2 * shape.hidden_size**2


def all_experts(shape: ModelShape) -> ModelShape:
    """Returns the model with every token using every expert, as MFU and MBU of dense models assume."""
    layers: list[LayerShape] = []
    for layer in shape.layers:
        ffn, mixer = layer.ffn, layer.attention
        if isinstance(ffn, MoEShape):
            layer = replace(layer, ffn=replace(ffn, top_k=ffn.num_experts))
        if isinstance(mixer, AttentionExpertsShape):
            layer = replace(layer, attention=replace(mixer, top_k=mixer.num_experts))
        layers.append(layer)
    return replace(shape, layers=tuple(layers))


def _scores(mixer: Mixer, keys: float) -> float:
    """Computes the FLOPs of scores and weighted values over ``keys`` keys: two products."""
    return 2 * mixer.score_width * keys
