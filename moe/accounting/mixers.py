"""Mixers, which move information between tokens, with the properties that determine their cost.

A *mixer* is attention, latent attention or a state-space model. Tokens are multiplied by a *matrix*, at two
FLOPs per element, but not by a *vector* (bias, norm, sink). All counts are exact integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

QKNorm = Literal["none", "head", "full"]


class Mixer(ABC):
    """Part of a layer that moves information between tokens."""

    @abstractmethod
    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the matrices that a token uses."""

    @abstractmethod
    def vector_parameters(self, hidden_size: int) -> int:
        """Returns the number of all other elements."""

    @abstractmethod
    def bias_parameters(self, hidden_size: int) -> int:
        """Returns the number of the other elements that are biases of projections."""

    @property
    def score_width(self) -> int:
        """Channels of queries and values over all heads, at two FLOPs each for every key that is seen."""
        return 0

    @property
    def cache_width(self) -> int:
        """Elements per token in the cache."""
        return 0

    @property
    def state_size(self) -> int:
        """Elements of the state that summarises all tokens so far."""
        return 0

    @property
    def scan_flops(self) -> int:
        """FLOPs per token beside matrices and attention."""
        return 0

    def idle_parameters(self, hidden_size: int) -> int:
        """Returns the elements of experts that a token does not use; 0 without experts."""
        return 0

    def keys_at(self, position: int) -> float:
        """Returns the keys that the query at a position (from 1) sees, itself included."""
        return position

    def keys_read(self, length: int, new: int) -> float:
        """Returns the keys that a pass over the last ``new`` of ``length`` positions reads: their union."""
        return self.keys_at(length - new + 1) + new - 1

    def mean_keys(self, seq_len: int) -> float:
        """Returns the mean number of keys that a query of a sequence sees, under causal attention."""
        return mean_context(seq_len)

    def most_keys(self, seq_len: int) -> int:
        """Returns the largest number of keys that a query can see, for conventions that ignore causality."""
        return seq_len


def mean_context(seq_len: int, window: int | None = None) -> float:
    """Computes the mean number of keys that a query sees under causal attention, itself included.

    The query at position t (from 1) sees ``min(t, window)``; without a window the mean is ``(S + 1) / 2``.
    """
    reach = seq_len if window is None else min(window, seq_len)
    # a triangle while the window fills, then a band
    return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len


@dataclass(frozen=True)
class AttentionShape(Mixer):
    """Shape of multi-head or grouped-query attention.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        sliding_window: Positions that a query sees, itself included; None for all earlier ones.
        bias: True if the query, key and value projections have biases.
        output_bias: True if the output projection has one.
        qk_norm: Scale of the norm on queries and keys: none, one value per channel of a ``head``, or
            one per channel of all heads (``full``).
        qk_norm_bias: True if that norm has a bias beside its scale.
        chunk: Size of the chunks within which queries see keys; None without chunks.
        sinks: True if every head has a learned logit that takes part in its softmax.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = "none"
    qk_norm_bias: bool = False
    chunk: int | None = None
    sinks: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the four projections."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of biases, query-key norms and sinks."""
        norm = {"none": 0, "head": 2, "full": self.num_heads + self.num_kv_heads}[self.qk_norm]
        norm *= self.head_dim * (1 + self.qk_norm_bias)
        return self.bias_parameters(hidden_size) + norm + self.sinks * self.num_heads

    def bias_parameters(self, hidden_size: int) -> int:
        """Elements of the projections' biases."""
        channels = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return self.bias * channels + self.output_bias * hidden_size

    @property
    def score_width(self) -> int:
        """Query and value channels of all query heads."""
        return 2 * self.num_heads * self.head_dim

    @property
    def cache_width(self) -> int:
        """Key and value channels."""
        return 2 * self.num_kv_heads * self.head_dim

    def keys_at(self, position: int) -> int:
        """Returns the keys within the window, or since the start of the chunk."""
        if self.chunk is not None:
            return (position - 1) % self.chunk + 1
        return position if self.sliding_window is None else min(position, self.sliding_window)

    def mean_keys(self, seq_len: int) -> float:
        """Returns `mean_context`; a chunk counts as a sequence."""
        if self.chunk is None:
            return mean_context(seq_len, self.sliding_window)
        whole, rest = divmod(seq_len, self.chunk)
        return (whole * self.chunk * (self.chunk + 1) / 2 + rest * (rest + 1) / 2) / seq_len

    def most_keys(self, seq_len: int) -> int:
        """Returns the length of window or chunk, if shorter than the sequence."""
        return min(seq_len, self.sliding_window or seq_len, self.chunk or seq_len)


@dataclass(frozen=True)
class LatentAttentionShape(Mixer):
    """Shape of multi-head latent attention (A. Liu et al., "DeepSeek-V2", arXiv:2405.04434, section 2.1).

    The cache holds the latent of keys and values and one rotary key for all heads. Training and prefill
    expand the latent to keys and values of every head; FLOPs are counted for that.

    Attributes:
        num_heads: Heads.
        query_rank: Width of the queries' latent; None if they are projected directly.
        kv_rank: Width of the latent of keys and values.
        nope_dim: Channels of a query or key without position.
        rope_dim: Channels of a query or key with position.
        value_dim: Channels of a value.
        bias: True if the projections down to the latents and the output projection have biases.
    """

    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the projections: down to the latents, up from them, and out."""
        queries = self.num_heads * (self.nope_dim + self.rope_dim)
        rank = self.query_rank
        query = hidden_size * queries if rank is None else rank * (hidden_size + queries)
        down = hidden_size * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return query + down + up + self.num_heads * self.value_dim * hidden_size

    def vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of biases and of the norms on the latents."""
        return self.bias_parameters(hidden_size) + (self.query_rank or 0) + self.kv_rank

    def bias_parameters(self, hidden_size: int) -> int:
        """Elements of the projections' biases."""
        return self.bias * ((self.query_rank or 0) + self.kv_rank + self.rope_dim + hidden_size)

    @property
    def score_width(self) -> int:
        """Query and value channels of all heads."""
        return self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def cache_width(self) -> int:
        """Channels of the latent and the rotary key."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class MambaShape(Mixer):
    """Shape of a Mamba-1 selective state-space model (A. Gu, T. Dao, "Mamba", arXiv:2312.00752).

    Attributes:
        inner: Channels.
        state: Values of state per channel.
        conv: Positions of the convolution.
        dt_rank: Rank of the step size.
        conv_bias: True if the convolution has a bias.
        bias: True if the projections in and out have biases.
        inner_norms: True if step size, B and C are normed, as in Jamba.
    """

    inner: int
    state: int
    conv: int
    dt_rank: int
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the projections and of the convolution."""
        selection = self.inner * (self.dt_rank + 2 * self.state) + self.dt_rank * self.inner
        return 3 * hidden_size * self.inner + selection + self.inner * self.conv

    def vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of A, D, biases and norms."""
        norms = self.inner_norms * (self.dt_rank + 2 * self.state)
        return self.inner * (self.state + 1) + norms + self.bias_parameters(hidden_size)

    def bias_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the biases; the step size always has one."""
        return self.inner * (1 + self.conv_bias) + self.bias * (2 * self.inner + hidden_size)

    @property
    def state_size(self) -> int:
        """Elements of the state, and of the convolution's past inputs."""
        return self.inner * (self.state + self.conv)

    @property
    def scan_flops(self) -> int:
        """Seven FLOPs per value of state: three to discretise, two to update, two to read."""
        return 7 * self.inner * self.state

    def keys_at(self, position: int) -> int:
        """None: there are no keys."""
        return 0

    def mean_keys(self, seq_len: int) -> float:
        """None: there are no keys."""
        return 0.0

    def most_keys(self, seq_len: int) -> int:
        """None: there are no keys."""
        return 0
