"""Layers of decoders, with the properties that determine their cost. All counts are exact integers.

A layer has a *mixer* (`moe.accounting.mixers`) and a feed-forward network, dense or MoE. Tokens are
multiplied by a *matrix*, at two FLOPs per element, but not by a *vector* (bias, norm, sink).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.mixers import Mixer


@dataclass(frozen=True)
class DenseFFNShape:
    """Feed-forward network: up and down projection, and a gate beside up if ``gated``."""

    width: int
    gated: bool = True
    bias: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the projections."""
        return (3 if self.gated else 2) * hidden_size * self.width

    def vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the biases."""
        return self.bias * ((2 if self.gated else 1) * self.width + hidden_size)


@dataclass(frozen=True)
class MoEShape:
    """Shape of an MoE block.

    Attributes:
        num_experts: Routed experts.
        top_k: Routed experts that a token uses.
        width: Inner width of a routed expert.
        gated: True if each expert, the shared one included, has a gate beside its up projection.
        bias: True if each expert has biases.
        shared_width: Inner width of the shared expert that every token uses; 0 for none. Several shared
            experts count as one of their joint width.
        shared_gate: True if a learned gate, one row of the hidden size, scales the shared expert's output.
        shared_bias: True if the shared expert has biases.
        router_matrix: Elements of the router's matrices; None for one row of the hidden size per expert.
        router_vector: Other elements of the router.
    """

    num_experts: int
    top_k: int
    width: int
    gated: bool = True
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    shared_bias: bool = False
    router_matrix: int | None = None
    router_vector: int = 0

    @property
    def expert(self) -> DenseFFNShape:
        """One routed expert."""
        return DenseFFNShape(self.width, self.gated, self.bias)

    def expert_matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of a routed expert's projections."""
        return self.expert.matrix_parameters(hidden_size)

    def expert_vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of a routed expert's biases."""
        return self.expert.vector_parameters(hidden_size)

    @property
    def shared(self) -> DenseFFNShape:
        """Shared expert; of width 0 without one."""
        return DenseFFNShape(self.shared_width, self.gated, self.shared_bias and self.shared_width > 0)

    def router_matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the router's matrices."""
        return self.num_experts * hidden_size if self.router_matrix is None else self.router_matrix

    def always_matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of matrices that every token uses: router, shared expert and its gate."""
        own = self.router_matrix_parameters(hidden_size) + self.shared_gate * hidden_size
        return own + self.shared.matrix_parameters(hidden_size)

    def always_vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the router's and the shared expert's vectors."""
        return self.router_vector + self.shared.vector_parameters(hidden_size)


@dataclass(frozen=True)
class LayerShape:
    """Block of a decoder: mixer, feed-forward network, and norms.

    Attributes:
        attention: The mixer.
        ffn: The feed-forward network.
        num_norms: Norms with a scale over the hidden size.
        norm_bias: True if these norms have a bias, too.
    """

    attention: Mixer
    ffn: DenseFFNShape | MoEShape
    num_norms: int = 2
    norm_bias: bool = False

    def norm_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the norms over the hidden size."""
        return self.num_norms * (1 + self.norm_bias) * hidden_size


@dataclass(frozen=True)
class ModelShape:
    """Decoder: embedding, layers, a norm, and a language-model head.

    Attributes:
        layers: The layers, in order.
        hidden_size: Width between layers.
        vocab_size: Rows of embedding and head.
        tied_embeddings: True if embedding and head are one matrix.
        final_norms: Vectors of the norm after the last layer: 1 for a scale, 2 with a bias, 0 for neither.
        head_bias: True if the head has a bias.
        next_token_layers: Layers that only help training to predict further tokens. They are not among the
            parameters, since transformers does not build them; the ``megatron`` convention counts them.
        part: Name of this part of a larger model, such as its text tower; empty for a whole model.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    final_norms: int = 1
    head_bias: bool = False
    next_token_layers: int = 0
    part: str = ""

    @property
    def attention(self) -> tuple[Mixer, ...]:
        """The mixer of every layer, in order."""
        return tuple(layer.attention for layer in self.layers)

    @property
    def moe(self) -> tuple[MoEShape, ...]:
        """The MoE blocks, in order."""
        return tuple(layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEShape))

    @property
    def embedding(self) -> int:
        """Elements of the embedding, equal to those of the head."""
        return self.vocab_size * self.hidden_size
