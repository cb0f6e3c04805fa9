"""The layers that decoders are made of, as far as their cost depends on them. All counts are exact integers.

A layer has a *mixer* (`moe.accounting.mixers`) and a feed-forward network, dense or a mixture of experts. A
*matrix* is what a token is multiplied by: two FLOPs an element. A *vector* (bias, norm, sink) is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.mixers import Mixer


@dataclass(frozen=True)
class DenseFFNShape:
    """A feed-forward network: up and down, and a gate beside up when ``gated``."""

    width: int
    gated: bool = True
    bias: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Elements of the projections."""
        return (3 if self.gated else 2) * hidden_size * self.width

    def vector_parameters(self, hidden_size: int) -> int:
        """Elements of the biases."""
        return self.bias * ((2 if self.gated else 1) * self.width + hidden_size)


@dataclass(frozen=True)
class MoEShape:
    """A mixture of experts.

    Attributes:
        num_experts: Routed experts.
        top_k: Routed experts that a token uses.
        width: Inner width of a routed expert.
        gated: Each expert has a gate beside its up projection; the shared one too.
        bias: Each expert has biases.
        shared_width: Inner width of the shared expert that every token uses; 0 for none. Several shared
            experts are one of their joint width.
        shared_gate: The shared expert's output is scaled by a learned gate, one row of the hidden size.
        shared_bias: The shared expert has biases.
        router_matrix: Elements of the router's matrices; None for one row of the hidden size an expert.
        router_vector: Its other elements.
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
        """Elements of a routed expert's projections."""
        return self.expert.matrix_parameters(hidden_size)

    def expert_vector_parameters(self, hidden_size: int) -> int:
        """Elements of a routed expert's biases."""
        return self.expert.vector_parameters(hidden_size)

    @property
    def shared(self) -> DenseFFNShape:
        """What every token uses beside its routed experts; of width 0 where there is none."""
        return DenseFFNShape(self.shared_width, self.gated, self.shared_bias and self.shared_width > 0)

    def router_matrix_parameters(self, hidden_size: int) -> int:
        """Elements of the router's matrices."""
        return self.num_experts * hidden_size if self.router_matrix is None else self.router_matrix

    def always_matrix_parameters(self, hidden_size: int) -> int:
        """Elements of what every token is multiplied by: router, shared expert and its gate."""
        own = self.router_matrix_parameters(hidden_size) + self.shared_gate * hidden_size
        return own + self.shared.matrix_parameters(hidden_size)

    def always_vector_parameters(self, hidden_size: int) -> int:
        """Elements of the router's and the shared expert's vectors."""
        return self.router_vector + self.shared.vector_parameters(hidden_size)


@dataclass(frozen=True)
class LayerShape:
    """One block: mixer, feed-forward network, and its norms.

    Attributes:
        attention: The mixer.
        ffn: The feed-forward network.
        num_norms: Norms with a scale over the hidden size.
        norm_bias: These norms have a bias too.
    """

    attention: Mixer
    ffn: DenseFFNShape | MoEShape
    num_norms: int = 2
    norm_bias: bool = False

    def norm_parameters(self, hidden_size: int) -> int:
        """Elements of the norms over the hidden size."""
        return self.num_norms * (1 + self.norm_bias) * hidden_size


@dataclass(frozen=True)
class ModelShape:
    """A decoder: embedding, layers, a norm, and a language-model head.

    Attributes:
        layers: In order.
        hidden_size: Width between layers.
        vocab_size: Rows of embedding and head.
        tied_embeddings: Embedding and head are one matrix.
        final_norms: Vectors of the norm after the last layer: 1 for a scale, 2 with a bias, 0 for neither.
        head_bias: The head has a bias.
        next_token_layers: Layers that only help training to predict further tokens. They are not among the
            parameters, since transformers does not build them; the ``megatron`` convention counts them.
        part: What of a larger model this is, such as its text tower; empty for the whole.
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
        """The mixtures of experts, in order."""
        return tuple(layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEShape))

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and as many of the head."""
        return self.vocab_size * self.hidden_size
