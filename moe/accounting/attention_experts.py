"""Cost of attention whose key-value heads are experts.

The keys that a query sees depend on the text: in an expert it sees the earlier tokens that went there too.
Counts are expectations for tokens that choose independently and uniformly; with K = E they equal the dense
attention. Matrices and cache entries per token are exact.

Letters: E experts, K experts a token, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.layers import ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, Mixer


@dataclass(frozen=True)
class AttentionExpertsShape(Mixer):
    """Shape of a grouped-query attention cut into its key-value heads, with a router over them.

    Source: Qu et al. 2024 (arXiv 2411.15708), attention MoE; see `moe.attention.routed_attention`.

    Attributes:
        dense: The attention that was cut; E is its key-value heads.
        top_k: K.
        router_matrix: Elements of the router's matrices.
        router_vector: Other elements of the router.
    """

    dense: AttentionShape
    top_k: int
    router_matrix: int
    router_vector: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.dense.num_kv_heads

    @property
    def _share(self) -> float:
        return self.top_k / self.num_experts

    def expert_matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of an expert's four projections."""
        return self.dense.matrix_parameters(hidden_size) // self.num_experts

    def expert_vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements of an expert's biases; the output bias belongs to none."""
        all_biases = self.dense.bias_parameters(hidden_size) - self.dense.output_bias * hidden_size
        return all_biases // self.num_experts

    def always_vector_parameters(self, hidden_size: int) -> int:
        """Returns the elements that every token uses: norms of heads, output bias, the router's vectors."""
        experts = self.num_experts * self.expert_vector_parameters(hidden_size)
        return self.dense.vector_parameters(hidden_size) - experts + self.router_vector

    def matrix_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the router's and K experts' matrices."""
        return self.router_matrix + self.top_k * self.expert_matrix_parameters(hidden_size)

    def vector_parameters(self, hidden_size: int) -> int:
        """Returns all other elements that a token uses."""
        experts = self.top_k * self.expert_vector_parameters(hidden_size)
        return self.always_vector_parameters(hidden_size) + experts

    def bias_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the biases of K experts and of the output."""
        experts = self.top_k * self.expert_vector_parameters(hidden_size)
        return experts + self.dense.output_bias * hidden_size

    def idle_parameters(self, hidden_size: int) -> int:
        """Returns the elements of the experts that a token does not use."""
        expert = self.expert_matrix_parameters(hidden_size) + self.expert_vector_parameters(hidden_size)
        return (self.num_experts - self.top_k) * expert

    @property
    def score_width(self) -> int:
        """Query and value channels of the heads of K experts."""
        return self.dense.score_width * self.top_k // self.num_experts

    @property
    def cache_width(self) -> int:
        """Key and value channels of K experts: only a token's own experts remember it."""
        return 2 * self.top_k * self.dense.head_dim

    def keys_at(self, position: int) -> float:
        """Returns the expected number: itself, and the share of earlier tokens in the same expert."""
        return 1 + (self.dense.keys_at(position) - 1) * self._share

    def keys_read(self, length: int, new: int) -> float:
        """Returns the expected number over the experts that new tokens use, with their share of the past."""
        past = self.dense.keys_at(length - new + 1) - 1
        return past * (1 - (1 - self._share) ** new) + new

    def mean_keys(self, seq_len: int) -> float:
        """Returns the mean of `keys_at`."""
        return 1 + (self.dense.mean_keys(seq_len) - 1) * self._share

    def most_keys(self, seq_len: int) -> int:
        """Returns the dense number, as all tokens may go to one expert."""
        return self.dense.most_keys(seq_len)


def attention_moe_blocks(shape: ModelShape) -> tuple[AttentionExpertsShape, ...]:
    """Returns the attention layers of a model whose heads are experts, in order."""
    return tuple(mixer for mixer in shape.attention if isinstance(mixer, AttentionExpertsShape))


def moe_blocks(shape: ModelShape) -> tuple[MoEShape | AttentionExpertsShape, ...]:
    """Returns all routed blocks: networks in order, then attention, as in `moe.metrics.report_load`."""
    return (*shape.moe, *attention_moe_blocks(shape))
