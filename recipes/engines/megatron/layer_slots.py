"""Modules for the slots of Megatron's layers: Graft's routers and experts, norms, and attention.

They are plain modules of torch: megatron-core requires nothing but their call signatures.

Letters: S sequence length (of a rank's part under sequence parallelism), B samples, D model width, T = B * S
tokens, E experts, K slots a token, R routed rows, H heads, G heads of keys and values, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.plan.row_plan import make_plan
from moe.dispatch.base import Dispatched
from moe.errors import ConfigError
from moe.layer import MoELayer
from moe.routing.balance import attach_loss
from moe.types import LayerContext, Routing

# From this version on Megatron builds experts by calling what is in their slot.
_BUILDERS_SINCE = (0, 17)


def as_map(routing: Routing) -> tuple[Tensor, Tensor]:
    """Converts a routing to Megatron's form: ``[T, E]`` weights, 0 off the map, and the ``[T, E]`` bool map.

    A token that names an expert in two slots gets the sum of both weights, which is the same function.
    """
    ids_TK, weights_TK, E = routing.expert_ids_TK, routing.weights_TK, routing.num_experts
    if routing.slot_mask_TK is not None:
        # Unused slots fall into a column past the last, which is cut off.
        ids_TK = ids_TK.masked_fill(~routing.slot_mask_TK, E)
        weights_TK = weights_TK.masked_fill(~routing.slot_mask_TK, 0.0)
    weights_TE = weights_TK.new_zeros(len(ids_TK), E + 1).scatter_add(1, ids_TK, weights_TK)
    map_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    return weights_TE[:, :E], map_TE[:, :E]


class RouterSlot(nn.Module):
    """Graft's router in the place of Megatron's.

    It also does what Graft's layer does besides routing: attach the balance losses and keep the statistics.

    Under sequence parallelism each rank gathers the sequences, routes all tokens, and keeps its own. So
    properties of a sequence, or of the micro-batch, are the same as on one rank.

    Attributes:
        router: The router of Graft's layer.
        ranks: Number of ranks over which sequences are sharded.
        rank: Index of this rank among them.
        most: Largest number of experts that the dispatcher can send a token to; None for all.
    """

    def __init__(
        self,
        layer: MoELayer,
        ranks: int = 1,
        rank: int = 0,
        gather: Callable[[Tensor], Tensor] | None = None,
        most: int | None = None,
    ) -> None:
        """Takes over the router of Graft's MoE layer.

        ``gather`` concatenates the parts of all ranks along the sequence, and in backward sums the ranks'
        gradients of each part; it is not called on a single rank.
        """
        super().__init__()
        self.router = layer.router
        self.ranks, self.rank, self.most = ranks, rank, most
        self._gather = gather
        self._context: LayerContext = layer.context
        self._stats = layer.stats
        self.layer_number: int | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Keeps the number that Megatron gives each layer, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden_SBD: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes ``[S, B, D]`` to weights and map ``[S * B, E]``; the padding is taken from the context."""
        if self.ranks > 1:
            assert self._gather is not None, "sequences are sharded, and nothing gathers them"
            hidden_SBD = self._gather(hidden_SBD)
        S, B, D = hidden_SBD.shape
        # Graft's routers take tokens sample by sample, in the order of the context's ids and masks.
        x_TD = hidden_SBD.transpose(0, 1).reshape(B * S, D)
        routing = self.router(x_TD, self._context)
        self._require_few(routing)
        probs_TE, map_TE = as_map(routing)
        run = self._context.run
        if self.training:
            for loss in routing.losses.values():
                # Each rank attaches the whole loss, and the gradients of all ranks are summed.
                probs_TE = attach_loss(probs_TE, loss, run.loss_scale / self.ranks)
            self._stats.record(run.micro_batch, routing, self._context.token_mask_T(B * S))
        return self._own(probs_TE, B), self._own(map_TE, B)

    def _require_few(self, routing: Routing) -> None:
        """Rejects a routing with more experts a token than the dispatcher supports, without a sync."""
        slots = routing.expert_ids_TK.shape[1]
        if self.most is not None and slots > self.most:
            name = self.router.name
            rule = f"it sends a token to {self.most} experts at most, and router={name} named {slots}"
            remedy = "Set engine.dispatcher=alltoall."
            raise ConfigError.one("engine.dispatcher", "deepep", rule, remedy)

    def _own(self, values_TE: Tensor, samples: int) -> Tensor:
        """Returns this rank's tokens in Megatron's order: position by position, not sample by sample."""
        values_SBE = values_TE.unflatten(0, (samples, -1)).transpose(0, 1)
        return values_SBE.chunk(self.ranks)[self.rank].flatten(0, 1)


class ExpertsSlot(nn.Module):
    """Graft's stacked experts in the place of Megatron's.

    Attributes:
        experts: The experts of Graft's layer that this rank holds.
    """

    def __init__(
        self, num_local: int, config: Any, layer: MoELayer, pg_collection: Any = None, name: str | None = None
    ) -> None:
        """Takes the arguments with which Megatron builds experts, before and since version 0.17.

        Args:
            num_local: Number of experts of this rank.
            config: Megatron's config.
            layer: Graft's MoE layer; its experts are sharded already.
            pg_collection: Megatron's process groups.
            name: Name of the module, given by newer versions.
        """
        super().__init__()
        self.experts = layer.experts
        count = len(self.experts.w_down_EDF)
        assert count == num_local, f"the layer holds {count} experts, Megatron gives this rank {num_local}"

    def forward(
        self, rows_RD: Tensor, tokens_per_expert_E: Tensor, probs_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weighted results, and no bias, for rows that are sorted by expert."""
        counts_E = tokens_per_expert_E.to(rows_RD.device)
        ids_E = torch.arange(len(counts_E), device=rows_RD.device)
        ids_R1 = ids_E.repeat_interleave(counts_E, output_size=len(rows_RD))[:, None]
        plan = make_plan(ids_R1, len(counts_E), None)
        return self.experts(Dispatched(rows_RD, probs_R[:, None], plan)), None

    def backward_dw(self) -> None:
        """Does nothing: Megatron may delay the gradients of weights, but Graft's are never delayed."""


def slot_of(
    module: type,
    version: tuple[int, ...],
    make_spec: Any,
    given: Mapping[str, Any],
    submodules: Any = None,
) -> Any:
    """Returns what goes into ``MoESubmodules.experts`` so that Megatron builds a class.

    Args:
        module: The class.
        version: Version of megatron-core, e.g. ``(0, 16, 1)``.
        make_spec: Its ``ModuleSpec``; used before 0.17, whose slot takes a spec instead of a callable.
        given: Arguments that Megatron does not pass.
        submodules: Submodules of Megatron's own classes.
    """
    within = {} if submodules is None else {"submodules": submodules}
    if version[:2] >= _BUILDERS_SINCE:
        return partial(module, **given, **within)
    return make_spec(module=module, params=dict(given), **within)


class SharedSlot(nn.Module):
    """Graft's shared expert in the place of Megatron's; each rank computes it for its own tokens."""

    def __init__(
        self, layer: MoELayer, config: Any = None, pg_collection: Any = None, gate: bool = False
    ) -> None:
        super().__init__()
        assert layer.shared is not None, "a layer without a shared expert"
        self.shared = layer.shared

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """Computes ``[S, B, D] -> [S, B, D]``."""
        out_SBD: Tensor = self.shared(hidden_SBD)
        return out_SBD


class Norm(nn.RMSNorm):
    """RMSNorm that is marked under sequence parallelism, where its gradient is of a part of each sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]


class Attention(nn.Module):
    """Attention by torch's fused kernels, on every device.

    Megatron's own materialises the scores unless TransformerEngine is installed.
    """

    def __init__(self, config: Any, **unused: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(
        self,
        q_SBHC: Tensor,
        k_SBGC: Tensor,
        v_SBGC: Tensor,
        hidden_B1SS: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Returns ``[S, B, H * C]``. The mask is True where a position is hidden; None is causal."""
        assert attention_bias is None and packed_seq_params is None, (attention_bias, packed_seq_params)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHC, k_SBGC, v_SBGC))
        out_BHSC = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if hidden_B1SS is None else ~hidden_B1SS,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=hidden_B1SS is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out_BHSC.permute(2, 0, 1, 3).flatten(2)
