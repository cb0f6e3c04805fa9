"""Blocks that a model is cut into over stages, and the cost of one token in each.

A block is a layer, the embedding, or the head. Layers that predict further tokens come before the head.

Letters: E experts, K experts a token, D model width, F expert width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, LatentAttentionShape, MambaShape, Mixer

# Channels of query and value, together, below which exponentials instead of products limit attention.
_FULL_HEAD = 256


@dataclass(frozen=True)
class Block:
    """Part of a model; figures are per token unless stated otherwise.

    Attributes:
        parameters: Elements outside routed experts, of the whole block.
        expert_parameters: Elements of all routed experts.
        matrices: Elements of matrices that a token uses outside routed experts.
        again: Those of ``matrices`` that selective recomputation multiplies once more.
        expert_matrices: Elements of matrices of one routed expert.
        scores: FLOPs of scores and weighted values in forward.
        keys: Channels of keys and values, which ranks that share a sequence exchange.
        residual: 16-bit elements kept as the input of ``full`` recomputation.
        wide: 16-bit elements kept for backward: of attention, norms and activation functions.
        narrow: Elements kept as operands of products, in their precision.
        wide_again: Elements of ``wide`` that selective recomputation drops.
        narrow_again: Elements of ``narrow`` that it drops.
        expert_wide: 16-bit elements kept for one row of one expert.
        expert_narrow: Elements kept for that row as operands of products.
        expert_narrow_again: Elements of ``expert_narrow`` that selective recomputation drops.
        logits: Elements of the head's output.
        experts: Shape of the experts; None in other blocks.
        width: D.
        gathers: Times that tensor parallelism gathers or scatters D channels in forward.
    """

    parameters: int
    expert_parameters: int = 0
    matrices: int = 0
    again: int = 0
    expert_matrices: int = 0
    scores: float = 0.0
    keys: int = 0
    residual: int = 0
    wide: int = 0
    narrow: int = 0
    wide_again: int = 0
    narrow_again: int = 0
    expert_wide: int = 0
    expert_narrow: int = 0
    expert_narrow_again: int = 0
    logits: int = 0
    experts: MoEShape | None = None
    width: int = 0
    gathers: int = 0

    @property
    def is_layer(self) -> bool:
        """True if it is neither embedding nor head."""
        return self.gathers > 1

    @property
    def top_k(self) -> int:
        """K; 0 without experts."""
        return 0 if self.experts is None else self.experts.top_k


#: Blocks of a rank or a stage, each with its count.
Blocks = tuple[tuple[Block, int], ...]


@dataclass(frozen=True)
class Model:
    """Model as blocks.

    Attributes:
        kinds: Its different blocks.
        order: Kind of the embedding, of each layer, of each layer for further tokens, and of the head.
    """

    kinds: tuple[Block, ...]
    order: tuple[int, ...]

    def part(self, items: Iterable[int]) -> Blocks:
        """Returns the blocks at these places, counted by kind."""
        counts = Counter(self.order[item] for item in items)
        return tuple((self.kinds[kind], count) for kind, count in counts.items())


def model_of(shape: ModelShape, seq_len: int) -> Model:
    """Returns a model's blocks, for sequences of ``seq_len`` tokens."""
    blocks = _blocks(shape, seq_len)
    kinds = tuple(dict.fromkeys(blocks))
    places = {block: place for place, block in enumerate(kinds)}
    return Model(kinds, tuple(places[block] for block in blocks))


def _blocks(shape: ModelShape, seq_len: int) -> tuple[Block, ...]:
    width = shape.hidden_size
    found = {layer: _layer(layer, width, seq_len) for layer in dict.fromkeys(shape.layers)}
    layers = [found[layer] for layer in shape.layers]
    vectors = shape.final_norms * width + shape.head_bias * shape.vocab_size
    # the copy of a tied table that the last stage holds is counted as well
    further = [_further(found[shape.layers[-1]], shape)] * shape.next_token_layers
    head = Block(
        shape.embedding + vectors,
        matrices=shape.embedding,
        wide=width,
        narrow=width,
        residual=width,
        logits=shape.vocab_size,
        width=width,
        gathers=1,
    )
    return (Block(shape.embedding, width=width, gathers=1), *layers, *further, head)


def _further(layer: Block, shape: ModelShape) -> Block:
    """Returns a layer that also joins two hidden states into one and applies the head."""
    join = 2 * shape.hidden_size**2
    return replace(
        layer,
        parameters=layer.parameters + join,
        matrices=layer.matrices + join + shape.embedding,
        logits=shape.vocab_size,
    )


def _layer(layer: LayerShape, width: int, seq_len: int) -> Block:
    mixer, ffn = layer.attention, layer.ffn
    latents, channels = _mixed(mixer)
    dense, again = ffn if isinstance(ffn, DenseFFNShape) else ffn.shared, _up_matrices(mixer)
    parameters = mixer.matrix_parameters(width) + mixer.vector_parameters(width)
    block = Block(
        parameters + layer.norm_parameters(width),
        matrices=mixer.matrix_parameters(width),
        again=again,
        scores=2 * _score_width(mixer) * mixer.mean_keys(seq_len),
        keys=_keys(mixer),
        residual=width,
        wide=2 * width + channels + (2 if dense.gated else 1) * dense.width,
        narrow=2 * width + latents + _out(mixer) + dense.width,
        wide_again=channels - _out(mixer) if again else 0,
        narrow_again=2 * width + dense.width,
        width=width,
        gathers=4,
    )
    if isinstance(ffn, DenseFFNShape):
        matrices = ffn.matrix_parameters(width)
        return replace(
            block,
            parameters=block.parameters + matrices + ffn.vector_parameters(width),
            matrices=block.matrices + matrices,
        )
    return _with_experts(block, ffn, width)


def _with_experts(block: Block, ffn: MoEShape, width: int) -> Block:
    one, always = ffn.expert.matrix_parameters(width), ffn.always_matrix_parameters(width)
    return replace(
        block,
        parameters=block.parameters + always + ffn.always_vector_parameters(width),
        expert_parameters=ffn.num_experts * (one + ffn.expert.vector_parameters(width)),
        matrices=block.matrices + always,
        expert_matrices=one,
        expert_wide=(2 if ffn.gated else 1) * ffn.width,
        expert_narrow=width + ffn.width,
        expert_narrow_again=ffn.width,
        experts=ffn,
        gathers=2,
    )


def _score_width(mixer: Mixer) -> int:
    """Returns the channels of scores and values; for narrow heads the equivalent of their exponentials."""
    if isinstance(mixer, AttentionShape):
        return max(mixer.score_width, mixer.num_heads * _FULL_HEAD)
    return mixer.score_width


def _mixed(mixer: Mixer) -> tuple[int, int]:
    """Returns the channels of latents, and of queries, keys, values and attention's output."""
    if isinstance(mixer, AttentionShape):
        return 0, 2 * (mixer.num_heads + mixer.num_kv_heads) * mixer.head_dim
    if isinstance(mixer, LatentAttentionShape):
        per_head = 2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.value_dim
        return (mixer.query_rank or 0) + mixer.kv_rank + mixer.rope_dim, mixer.num_heads * per_head
    assert isinstance(mixer, MambaShape), mixer
    # both projections in, the convolution, the step size, the scan and its gated output
    return 0, 6 * mixer.inner


def _out(mixer: Mixer) -> int:
    """Returns the channels of attention's output."""
    if isinstance(mixer, AttentionShape):
        return mixer.num_heads * mixer.head_dim
    if isinstance(mixer, LatentAttentionShape):
        return mixer.num_heads * mixer.value_dim
    assert isinstance(mixer, MambaShape), mixer
    return mixer.inner


def _keys(mixer: Mixer) -> int:
    if isinstance(mixer, LatentAttentionShape):
        return mixer.num_heads * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim)
    return mixer.cache_width


def _up_matrices(mixer: Mixer) -> int:
    """Returns the elements of the projections up from the latents."""
    if not isinstance(mixer, LatentAttentionShape):
        return 0
    queries = (mixer.query_rank or 0) * mixer.num_heads * (mixer.nope_dim + mixer.rope_dim)
    return queries + mixer.kv_rank * mixer.num_heads * (mixer.nope_dim + mixer.value_dim)
