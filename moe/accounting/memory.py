"""Memory for training and serving.

Weights, gradients and optimizer states are exact for the given bytes per element. Activations are rough: what
autograd keeps depends on kernels, and workspaces and fragmentation are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.bytes import BitWidths, cache_bytes, weight_bytes
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape
from moe.accounting.mixers import AttentionShape, LatentAttentionShape, MambaShape
from moe.accounting.params import count_from_shape


@dataclass(frozen=True)
class ElementBytes:
    """Bytes per element in training. The defaults are fp32 master weights and AdamW, autocast to 16 bits.

    Attributes:
        weights: Master weights.
        gradients: Gradients of the weights.
        optimizer: Both moments of AdamW.
        activations: Activations kept for backward.
    """

    weights: int = 4
    gradients: int = 4
    optimizer: int = 8
    activations: int = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one replica in training, not sharded.

    Attributes:
        weights: Exact.
        gradients: Exact.
        optimizer: Exact.
        activations: Rough; of one micro-batch, nothing recomputed, attention without its square matrix.
        activations_recomputed: Rough; with every block recomputed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: float
    activations_recomputed: float


@dataclass(frozen=True)
class ServingMemory:
    """Bytes in serving.

    Attributes:
        weights: Weights, with all experts.
        cache: Cache of all sequences at full length.
    """

    weights: float
    cache: float


def training_memory(
    shape: ModelShape, seq_len: int, micro_batch: int = 1, sizes: ElementBytes | None = None
) -> TrainingMemory:
    """Computes the training memory for ``micro_batch`` sequences of ``seq_len`` tokens."""
    sizes = sizes or ElementBytes()
    total = count_from_shape(shape).total
    tokens = seq_len * micro_batch
    blocks = [_kept_elements(layer, shape.hidden_size) for layer in shape.layers]
    # logits in the activations' dtype, and in fp32 for the loss
    logits = tokens * shape.vocab_size * (sizes.activations + 4)
    inputs = len(blocks) * shape.hidden_size
    return TrainingMemory(
        weights=total * sizes.weights,
        gradients=total * sizes.gradients,
        optimizer=total * sizes.optimizer,
        activations=tokens * sum(blocks) * sizes.activations + logits,
        activations_recomputed=tokens * (inputs + max(blocks, default=0)) * sizes.activations + logits,
    )


def serving_memory(
    shape: ModelShape, seq_len: int, sequences: int, bits: BitWidths | None = None
) -> ServingMemory:
    """Computes the serving memory for ``sequences`` of ``seq_len`` tokens at once."""
    return ServingMemory(weight_bytes(shape, bits), cache_bytes(shape, (seq_len,) * sequences, bits))


def _kept_elements(layer: LayerShape, width: int) -> float:
    """Returns the elements per token kept for backward: inputs of norms, products and activations."""
    mixer, ffn = layer.attention, layer.ffn
    if isinstance(mixer, AttentionExpertsShape):
        heads = mixer.dense.num_heads // mixer.num_experts
        # each copy of a token has its own input and output
        mixed = mixer.top_k * ((2 * heads + 2) * mixer.dense.head_dim + 2 * width)
    elif isinstance(mixer, AttentionShape):
        # queries, keys, values, and the attention's output
        mixed = (2 * mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    elif isinstance(mixer, LatentAttentionShape):
        latents = (mixer.query_rank or 0) + mixer.kv_rank
        per_head = 2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.value_dim
        mixed = latents + mixer.num_heads * per_head
    else:
        assert isinstance(mixer, MambaShape), mixer
        # both projections in, the convolution, the step size, the scan and its gated output; the states are
        # recomputed
        mixed = 6 * mixer.inner
    kept = 4 * width + mixed  # both norms' inputs and outputs
    if isinstance(ffn, DenseFFNShape):
        return kept + _inner(ffn)
    # each copy of a token has its own input and output
    return kept + ffn.top_k * (_inner(ffn.expert) + 2 * width) + _inner(ffn.shared)


def _inner(ffn: DenseFFNShape) -> int:
    """Returns the width of gate, up and their product; or of up and its activation."""
    return (3 if ffn.gated else 2) * ffn.width
