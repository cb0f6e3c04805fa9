"""Attention whose key-value heads are experts: a router sends each token to some of them.

Expert e is key-value head e of a grouped-query attention with the query heads that share it and the columns
of the output projection that these feed. A token has queries, keys and values only in its own experts: in
expert e it sees the earlier tokens that also went to e. The layer's output is the sum of the experts,
weighted by the router and multiplied by a constant; if all experts are used at weight 1, it equals the dense
attention.

Source: Qu et al. 2024 (arXiv 2411.15708), attention MoE.

Letters: B sequences, S positions, T = B S tokens, D model width, E experts, K slots a token, G query heads of
an expert, H head width, Q = G H, R rows of an expert, N largest number of new rows of a sequence, M largest
number of remembered rows of a sequence, C columns of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention.attention_memory import ExpertRows, KeyMemory, Remembered, nothing, rows_by_expert
from moe.metrics import LayerStats
from moe.routers.base import Router
from moe.routing.balance import attach_loss
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class AttentionContext(LayerContext):
    """View that an attention layer has of the run; schedules of K apply to feed-forward experts only."""

    def top_k(self, own: int) -> int:
        """Returns the router's own K."""
        return own


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of a grouped-query attention, cut into its key-value heads.

    Attributes:
        w_q_EQD: Query projections.
        w_k_EHD: Key projections.
        w_v_EHD: Value projections.
        w_o_EDQ: Columns of the output projection.
        b_q_EQ: Bias of the queries, or None.
        b_k_EH: Bias of the keys, or None.
        b_v_EH: Bias of the values, or None.
        b_o_D: Bias of the output, which belongs to no expert, or None.
    """

    w_q_EQD: Tensor
    w_k_EHD: Tensor
    w_v_EHD: Tensor
    w_o_EDQ: Tensor
    b_q_EQ: Tensor | None = None
    b_k_EH: Tensor | None = None
    b_v_EH: Tensor | None = None
    b_o_D: Tensor | None = None

    @classmethod
    def cut(
        cls, num_experts: int, weights: tuple[Tensor, Tensor, Tensor, Tensor], *biases: Tensor | None
    ) -> AttentionWeights:
        """Cuts the dense projections; the query heads of a key-value head are adjacent.

        Args:
            num_experts: E, the key-value heads.
            weights: Weights of query, key, value and output, each ``[out, in]``.
            biases: Biases of the same four.
        """
        query, key, value, output = weights
        b_query, b_key, b_value, b_output = biases

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.view(num_experts, -1)

        D = len(output)
        return cls(
            query.view(num_experts, -1, D),
            key.view(num_experts, -1, D),
            value.view(num_experts, -1, D),
            output.view(D, num_experts, -1).transpose(0, 1).contiguous(),
            rows(b_query),
            rows(b_key),
            rows(b_value),
            b_output,
        )


class AttentionExperts(nn.Module):
    """Module with the weights of E attention experts, stacked like those of other experts."""

    parameter_role: ClassVar[str] = "expert"

    def __init__(self, weights: AttentionWeights) -> None:
        super().__init__()
        self.w_q_EQD = nn.Parameter(weights.w_q_EQD)
        self.w_k_EHD = nn.Parameter(weights.w_k_EHD)
        self.w_v_EHD = nn.Parameter(weights.w_v_EHD)
        self.w_o_EDQ = nn.Parameter(weights.w_o_EDQ)
        self.b_q_EQ = _parameter(weights.b_q_EQ)
        self.b_k_EH = _parameter(weights.b_k_EH)
        self.b_v_EH = _parameter(weights.b_v_EH)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w_q_EQD.shape[0]

    @property
    def head_dim(self) -> int:
        """H."""
        return self.w_k_EHD.shape[1]

    def project(self, expert: int, x_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes ``[R, G, H]`` queries, ``[R, 1, H]`` keys and ``[R, 1, H]`` values of an expert's rows."""
        biases = (_row(self.b_q_EQ, expert), _row(self.b_k_EH, expert), _row(self.b_v_EH, expert))
        stacks = (self.w_q_EQD, self.w_k_EHD, self.w_v_EHD)
        query, key, value = (
            F.linear(x_RD, stack[expert], bias).view(len(x_RD), -1, self.head_dim)
            for stack, bias in zip(stacks, biases, strict=True)
        )
        return query, key, value

    def output(self, expert: int, attended_RGH: Tensor) -> Tensor:
        """Applies an expert's columns of the output projection, to ``[R, D]``."""
        return F.linear(attended_RGH.flatten(1), self.w_o_EDQ[expert])


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


class AttentionMoE(nn.Module):
    """Attention with a router over its key-value heads, ``[B, S, D] -> [B, S, D]``.

    Attributes:
        scale: Factor on the router's weights.
        b_o_D: Bias of the output projection, which every token gets; or None.
        q_norm: Norm of queries before their rotation, over the last axis; None without one.
        k_norm: The same for keys.
        dropout: Dropout of attention probabilities, in training.
        context: This layer's view of the run; the model fills it.
        stats: Routing statistics of the current step.
    """

    def __init__(
        self,
        router: Router[Any],
        weights: AttentionWeights,
        context: AttentionContext,
        *,
        scale: float = 1.0,
        norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = AttentionExperts(weights)
        self.b_o_D = _parameter(weights.b_o_D)
        self.q_norm, self.k_norm = norms
        self.scale = scale
        self.dropout = dropout
        self.context = context
        self.stats = LayerStats()

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        memory: KeyMemory | None = None,
    ) -> Tensor:
        """Routes the tokens and attends.

        Args:
            x_BSD: Tokens that follow the remembered ones.
            rotary: ``[B or 1, S, H]`` cosines and sines of the rotary embedding; None without one.
            mask: ``[B or 1, 1, S, C]`` over the last C positions: bool, True where a query may see, or a term
                that is added to the logits. None: a query sees every position up to its own.
            memory: Memory of earlier passes, which is extended.
        """
        T = x_BSD.shape[0] * x_BSD.shape[1]
        x_TD = x_BSD.reshape(T, -1)
        routing = self.router(x_TD, self.context)
        weights_TE, chosen_TE = by_expert(routing)
        real_T = self.context.token_mask_T(T)
        if real_T is not None:
            # Padding goes to no expert, so that it is not remembered.
            chosen_TE = chosen_TE & real_T[:, None]
        out_BSD = self.attend(x_BSD, weights_TE, chosen_TE, rotary, mask, memory)
        if self.training:
            for loss in routing.losses.values():
                out_BSD = attach_loss(out_BSD, loss, self.context.run.loss_scale)
            self.stats.record(self.context.run.micro_batch, routing, real_T)
        return out_BSD

    def attend(
        self,
        x_BSD: Tensor,
        weights_TE: Tensor,
        chosen_TE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        memory: KeyMemory | None = None,
    ) -> Tensor:
        """Attends for tokens that are already routed.

        Args:
            x_BSD: Tokens.
            weights_TE: Combine weights, without `scale`.
            chosen_TE: bool, True where a token uses an expert.
            rotary: As in `forward`.
            mask: As in `forward`.
            memory: As in `forward`.
        """
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        out_TD = x_TD.new_zeros(B * S, D, dtype=torch.promote_types(x_TD.dtype, weights_TE.dtype))
        for e, rows in enumerate(rows_by_expert(chosen_TE.view(B, S, -1))):
            if rows.longest == 0:
                continue
            attended_RGH = self._attended(e, rows, x_TD[rows.token_R], rotary, mask, memory)
            y_RD = self.experts.output(e, attended_RGH)
            weight_R = weights_TE[rows.token_R, e] * self.scale
            out_TD = out_TD.index_add(0, rows.token_R, (y_RD * weight_R[:, None]).to(out_TD.dtype))
        if memory is not None:
            memory.advance(S)
        if self.b_o_D is not None:
            out_TD = out_TD + self.b_o_D
        return out_TD.to(x_BSD.dtype).view(B, S, D)

    def _attended(
        self,
        expert: int,
        rows: ExpertRows,
        x_RD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        memory: KeyMemory | None,
    ) -> Tensor:
        """Computes ``[R, G, H]``: the attention of an expert's rows over all its remembered rows."""
        q_RGH, k_R1H, v_R1H = self.experts.project(expert, x_RD)
        q_RGH = q_RGH if self.q_norm is None else self.q_norm(q_RGH)
        k_R1H = k_R1H if self.k_norm is None else self.k_norm(k_R1H)
        if rotary is not None:
            q_RGH, k_R1H = (_rotated(vectors, rotary, rows).to(v_R1H.dtype) for vectors in (q_RGH, k_R1H))
        past = 0 if memory is None else memory.num_tokens
        k_RH, v_RH = k_R1H.squeeze(1), v_R1H.squeeze(1)
        if memory is None:
            found = nothing(len(rows.count_B), k_RH, v_RH).with_rows(rows, k_RH, v_RH, 0)
        else:
            found = memory.extend(expert, rows, k_RH, v_RH)
        q_BGNH = rows.padded(q_RGH).transpose(1, 2)
        # Without mask and past, rows are in order, so that plain causal attention applies.
        alone = mask is None and past == 0
        out_BGNH = F.scaled_dot_product_attention(
            q_BGNH,
            _for_heads(found.keys_BMH, q_BGNH),
            _for_heads(found.values_BMH, q_BGNH),
            attn_mask=None if alone else _row_mask(rows, found, mask, past, q_BGNH.dtype),
            is_causal=alone,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return rows.unpadded(out_BGNH.transpose(1, 2))


def by_expert(routing: Routing) -> tuple[Tensor, Tensor]:
    """Returns ``[T, E]`` weights and ``[T, E]`` bool choice of a routing."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if routing.slot_mask_TK is not None:
        used_TK = routing.slot_mask_TK
        ids_TK, weights_TK = ids_TK.where(used_TK, 0), weights_TK.where(used_TK, 0.0)
    zeros_TE = weights_TK.new_zeros(len(ids_TK), routing.num_experts)
    weights_TE = zeros_TE.scatter_add(1, ids_TK, weights_TK)
    chosen_TE = zeros_TE.detach().scatter_add(1, ids_TK, used_TK.to(zeros_TE.dtype)) > 0
    return weights_TE, chosen_TE


def _rotated(vectors: Tensor, rotary: tuple[Tensor, Tensor], rows: ExpertRows) -> Tensor:
    """Applies the rotary embedding to ``[R, heads, H]``: channel i rotates with channel i + H/2."""
    cos, sin = (
        table.expand(len(rows.count_B), -1, -1)[rows.sequence_R, rows.position_R][:, None] for table in rotary
    )
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat([-second, first], -1) * sin


def _for_heads(values_BMH: Tensor, like_BGNH: Tensor) -> Tensor:
    """Returns ``[B, G, M, H]``: the query heads of an expert share keys and values."""
    return values_BMH[:, None].expand(-1, like_BGNH.shape[1], -1, -1)


def _row_mask(
    rows: ExpertRows, found: Remembered, mask: Tensor | None, past: int, dtype: torch.dtype
) -> Tensor:
    """Returns ``[B, 1, N, M]``: the model's mask at an expert's rows, or a causal mask without one.

    Args:
        rows: The queries.
        found: The keys.
        mask: As in `AttentionMoE.forward`.
        past: Positions before this pass.
        dtype: Dtype of an additive mask, whose smallest number replaces minus infinity, so that a query that
            sees nothing does not give NaN.
    """
    real_B1M, position_B1M = found.real_BM[:, None], found.position_BM[:, None]
    query_BN = rows.padded(rows.position_R)
    if mask is None:
        seen_BNM = (position_B1M <= query_BN[..., None] + past) & real_B1M
        return _never_blind(seen_BNM)[:, None]
    B, (S, C) = len(rows.count_B), mask.shape[2:]
    # The mask's columns are the last C positions: under a window they do not start at 0.
    column_B1M = position_B1M - (past + S - C)
    real_B1M = real_B1M & (column_B1M >= 0)
    at_B11 = torch.arange(B, device=mask.device)[:, None, None]
    picked_BNM = mask[:, 0].expand(B, -1, -1)[at_B11, query_BN[..., None], column_B1M.clamp(0, C - 1)]
    if mask.dtype == torch.bool:
        return _never_blind(picked_BNM & real_B1M)[:, None]
    lowest = torch.finfo(dtype).min
    return picked_BNM.to(dtype).clamp_min(lowest).masked_fill(~real_B1M, lowest)[:, None]


def _never_blind(seen_BNM: Tensor) -> Tensor:
    """Lets queries that see nothing, i.e. padding, see everything, as nothing would give NaN."""
    return seen_BNM | ~seen_BNM.any(-1, keepdim=True)


def attention_layers(model: nn.Module) -> list[tuple[str, AttentionMoE]]:
    """Returns every layer of attention experts of a model with its module name, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AttentionMoE)]
