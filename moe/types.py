"""The types that travel between router, balance losses, dispatch, experts and layer.

Letters, the same in every file: T tokens, D model width, E experts, K slots a token, R routed rows
(one for each kept token-expert pair), F expert width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


class Config:
    """Base of every config dataclass. Unknown keys are refused when a config file is read into it.

    ``__pydantic_config__`` is read by pydantic, which this library does not import.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass
class RouterContext:
    """What routers may know about the run. One object, owned by the host, shared by all layers.

    A forward pre-hook of the host fills the batch fields; the training loop fills the step fields.
    Layers read it through `LayerContext`; nothing is global.

    Attributes:
        step: Optimizer steps done so far.
        micro_batch: Index of the micro-batch within the step; statistics are kept per micro-batch, so
            that activation recomputation overwrites them instead of counting twice.
        num_micro_batches: Micro-batches a step (gradient accumulation).
        loss_scale: What the main loss of a micro-batch is multiplied by before backward. Balance
            losses are scaled alike, so that their coefficient means the same under accumulation.
        group: Process group over which expert load is counted; None counts this rank alone.
        token_ids: ``[B, S]`` ids of the batch, or None.
        padding_mask: ``[B, S]`` bool, True where a token is real, or None when all are.
        keys: What else the caller knows of every token, by name (modality, class, timestep): ``[B, S]``.
            The caller sets it before each forward pass; routers by key read it.
        top_k: Layer index to experts a token, where that is another number than the router's own at this step
            (`moe.routing.top_k_schedule`). Set before each forward pass; read by `LayerContext.top_k`.
    """

    step: int = 0
    micro_batch: int = 0
    num_micro_batches: int = 1
    loss_scale: float = 1.0
    group: torch.distributed.ProcessGroup | None = None
    token_ids: Tensor | None = None
    padding_mask: Tensor | None = None
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    top_k: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerContext:
    """The view one MoE layer has of the run: the shared context and its own index."""

    run: RouterContext
    layer_index: int

    def top_k(self, own: int) -> int:
        """Experts a token of this layer at this step: ``own``, the router's, unless a schedule differs."""
        return self.run.top_k.get(self.layer_index, own)

    def num_sequences(self, num_tokens: int) -> int:
        """Sequences that the T tokens are of, all of one length; 1 when the batch is not known or empty."""
        ids = self.run.token_ids
        return ids.shape[0] if ids is not None and ids.dim() == 2 and ids.numel() == num_tokens > 0 else 1

    def token_mask_T(self, num_tokens: int) -> Tensor | None:
        """``[T]`` bool, True for real tokens; None when no mask is set or it is of another batch."""
        mask = self.run.padding_mask
        if mask is None or mask.numel() != num_tokens:
            return None
        return mask.reshape(-1)


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens. May hold a different number of experts for each token.

    Attributes:
        expert_ids_TK: ``[T, K]`` int64 expert of each slot; the value in an unused slot is ignored.
        weights_TK: ``[T, K]`` combine weights, at least fp32; they carry the gradient to the router.
        num_experts: E.
        slot_mask_TK: ``[T, K]`` bool, False where a slot is unused; None when all are used.
        scores_TE: ``[T, E]`` fp32 dense scores (probabilities) when the router has them.
        logits_TE: ``[T, E]`` fp32 router logits when the router has them.
        losses: Named scalar losses, already multiplied by their coefficient; the layer attaches
            their gradient.
        metrics: Named detached scalars for the dashboard.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    num_experts: int
    slot_mask_TK: Tensor | None = None
    scores_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
