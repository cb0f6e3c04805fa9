"""Bytes that a forward pass moves: weights that it touches, and the cache.

Tensors are sorted into classes with separate bits per element, since quantised checkpoints quantise only some
classes. Activations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.distinct import all_distinct
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import Mixer
from moe.accounting.passes import Batch


@dataclass(frozen=True)
class BitWidths:
    """Bits per element in memory, scales included, by class of tensor.

    Attributes:
        attention: Matrices of the mixers.
        dense: Matrices of dense feed-forward networks.
        shared: Matrices of shared experts.
        expert: Matrices of routed experts.
        expert_vector: Biases of routed experts; None for the bits of ``expert``.
        router: Routers and gates of shared experts.
        vector: Norms, and biases outside routed experts.
        embedding: The embedding, if it is not tied to the head.
        head: The head.
        kv: Keys and values, or latents.
        state: State-space models' state.
    """

    attention: float = 16
    dense: float = 16
    shared: float = 16
    expert: float = 16
    expert_vector: float | None = None
    router: float = 16
    vector: float = 16
    embedding: float = 16
    head: float = 16
    kv: float = 16
    state: float = 16


CLASSES = tuple(field.name for field in fields(BitWidths))


def uniform_bits(weights: float, cache: float | None = None) -> BitWidths:
    """Returns equal bits for all weights, and for the cache unless it is given."""
    cache = weights if cache is None else cache
    return BitWidths(**{name: cache if name in ("kv", "state") else weights for name in CLASSES})


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one forward pass, by part.

    Attributes:
        attention: Projections of the mixers with their biases.
        dense: Dense feed-forward networks.
        shared: Shared experts.
        experts: Routed experts that the batch touches.
        router: Routers and gates of shared experts.
        norms: Norms, sinks and other elements of mixers.
        head: The head, once.
        embedding: One row per new token.
        kv_read: Cache entries that the new tokens see, themselves included.
        kv_written: Cache of the new tokens.
        state: State-space models' state, read and written.
    """

    attention: float = 0.0
    dense: float = 0.0
    shared: float = 0.0
    experts: float = 0.0
    router: float = 0.0
    norms: float = 0.0
    head: float = 0.0
    embedding: float = 0.0
    kv_read: float = 0.0
    kv_written: float = 0.0
    state: float = 0.0

    def __add__(self, other: StepBytes) -> StepBytes:
        names = [field.name for field in fields(self)]
        return StepBytes(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def strict(self) -> float:
        """Equation 4 of MoE-CAP to the letter: attention, experts, and the cache read.

        Dense networks and shared experts are experts that every token uses. Router, norms, embedding and head
        are left out.
        """
        return self.attention + self.dense + self.shared + self.experts + self.kv_read

    @property
    def weights(self) -> float:
        """All touched weights."""
        layers = self.attention + self.dense + self.shared + self.experts + self.router + self.norms
        return layers + self.head + self.embedding

    @property
    def complete(self) -> float:
        """Sum of all parts."""
        return self.weights + self.kv_read + self.kv_written + self.state


def step_bytes(
    shape: ModelShape, batch: Batch, distinct: Sequence[float], bits: BitWidths | None = None
) -> StepBytes:
    """Computes the bytes of a forward pass of a batch, decode or prefill.

    Args:
        shape: Shape of the model.
        batch: Batch of the pass.
        distinct: Number of distinct routed experts of each of `moe.accounting.attention_experts.moe_blocks`,
            see `moe.accounting.distinct`.
        bits: Bits by class; 16 each by default.

    Raises:
        ValueError: There is not one number per MoE block, or one is not in 0 to E.

    Source: Y. Jiang et al., "MoE-CAP", arXiv:2412.07067, section 4.1.
    """
    bits = bits or BitWidths()
    limits = all_distinct(shape)
    used = tuple(distinct)
    if len(used) != len(limits) or any(not 0 <= n <= most for n, most in zip(used, limits, strict=True)):
        raise ValueError(
            f"distinct={used} must hold a number from 0 to E for MoE blocks of E={limits} experts."
        )
    networks, attention = iter(used[: len(shape.moe)]), iter(used[len(shape.moe) :])
    width, total = shape.hidden_size, _model_bytes(shape, batch, bits)
    for layer in shape.layers:
        count = next(networks) if isinstance(layer.ffn, MoEShape) else 0.0
        heads = next(attention) if isinstance(layer.attention, AttentionExpertsShape) else 0.0
        total += _mixer_bytes(layer.attention, width, heads, bits) + _cache_bytes(layer, batch, bits)
        total += _network_bytes(layer, width, count, bits)
    return total


def full_step_bytes(shape: ModelShape, batch: Batch, bits: BitWidths | None = None) -> StepBytes:
    """Computes the bytes under MBU's assumption that every expert is read, with embedding rows only."""
    return step_bytes(shape, batch, all_distinct(shape), bits)


def weight_bytes(shape: ModelShape, bits: BitWidths | None = None) -> float:
    """Returns the bytes of all weights in memory."""
    bits = bits or BitWidths()
    one = Batch((1,))
    step = full_step_bytes(shape, one, bits)
    table = 0.0 if shape.tied_embeddings else shape.embedding * bits.embedding / 8
    return step.weights - step.embedding + table


def kv_bytes_per_token(shape: ModelShape, bits: float = 16) -> float:
    """Returns the bytes of cache that a token adds while no window is full."""
    return sum(mixer.cache_width for mixer in shape.attention) * bits / 8


def cache_bytes(shape: ModelShape, lengths: Iterable[int], bits: BitWidths | None = None) -> float:
    """Returns the bytes of cache and state of sequences of these lengths; windows limit what is kept."""
    bits = bits or BitWidths()
    total = 0.0
    for length in lengths:
        for mixer in shape.attention:
            kept = mixer.cache_width * mixer.most_keys(length)
            total += (kept * bits.kv + mixer.state_size * bits.state) / 8
    return total


def _model_bytes(shape: ModelShape, batch: Batch, bits: BitWidths) -> StepBytes:
    width = shape.hidden_size
    table_bits = bits.head if shape.tied_embeddings else bits.embedding
    return StepBytes(
        norms=shape.final_norms * width * bits.vector / 8,
        head=(shape.embedding * bits.head + shape.head_bias * shape.vocab_size * bits.vector) / 8,
        embedding=batch.tokens * width * table_bits / 8,
    )


def _mixer_bytes(mixer: Mixer, width: int, distinct: float, bits: BitWidths) -> StepBytes:
    if isinstance(mixer, AttentionExpertsShape):
        expert = mixer.expert_matrix_parameters(width) * bits.attention
        expert += mixer.expert_vector_parameters(width) * bits.vector
        always = mixer.always_vector_parameters(width) - mixer.router_vector
        return StepBytes(
            attention=distinct * expert / 8,
            norms=always * bits.vector / 8,
            router=(mixer.router_matrix * bits.router + mixer.router_vector * bits.vector) / 8,
        )
    biases = mixer.bias_parameters(width)
    return StepBytes(
        attention=(mixer.matrix_parameters(width) * bits.attention + biases * bits.vector) / 8,
        norms=(mixer.vector_parameters(width) - biases) * bits.vector / 8,
    )


def _network_bytes(layer: LayerShape, width: int, distinct: float, bits: BitWidths) -> StepBytes:
    ffn = layer.ffn
    step = StepBytes(norms=layer.norm_parameters(width) * bits.vector / 8)
    if isinstance(ffn, DenseFFNShape):
        return step + StepBytes(dense=_ffn_bytes(ffn, width, bits.dense, bits.vector))
    gates = ffn.router_matrix_parameters(width) + ffn.shared_gate * width
    expert_vector = bits.expert if bits.expert_vector is None else bits.expert_vector
    return step + StepBytes(
        shared=_ffn_bytes(ffn.shared, width, bits.shared, bits.vector),
        experts=distinct * _ffn_bytes(ffn.expert, width, bits.expert, expert_vector),
        router=(gates * bits.router + ffn.router_vector * bits.vector) / 8,
    )


def _ffn_bytes(ffn: DenseFFNShape, width: int, matrix_bits: float, vector_bits: float) -> float:
    return (ffn.matrix_parameters(width) * matrix_bits + ffn.vector_parameters(width) * vector_bits) / 8


def _cache_bytes(layer: LayerShape, batch: Batch, bits: BitWidths) -> StepBytes:
    mixer = layer.attention
    one = mixer.cache_width * bits.kv / 8
    keys = sum(mixer.keys_read(length, new) for length, new in zip(batch.lengths, batch.new, strict=True))
    state = 2 * len(batch.lengths) * mixer.state_size * bits.state / 8
    return StepBytes(kv_read=one * keys, kv_written=one * batch.tokens, state=state)
