"""Types that router, balance losses, dispatch, experts and layer exchange.

Letters, the same in every file: T tokens, D model width, E experts, K slots a token, R routed rows
(one for each kept token-expert pair), F expert width, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from moe.errors import require_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Config:
    """Base of every config dataclass. Unknown keys in a config file are rejected, and so are bad numbers.

    Numbers are checked before the rules of the subclass, whether or not its ``__post_init__`` calls this one:
    not-a-number passes every rule of the form ``not x < 0``, and infinity ``x >= 0``.

    ``__pydantic_config__`` is read by pydantic, which this library does not import.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__post_init__" in vars(cls):
            setattr(cls, "__post_init__", _after_numbers(vars(cls)["__post_init__"]))  # noqa: B010

    def __post_init__(self) -> None:
        require_numbers(self)

    def idle(self) -> dict[str, str]:
        """Returns the options that have no effect beside the others of this config, each with the reason.

        A config that has such options says so here, by `unless`; a run names those that a user has set.
        """
        return {}


def unless(holds: bool, reason: str, *names: str) -> dict[str, str]:
    """Returns options as `Config.idle` does: none where a condition holds, else all with one reason."""
    return {} if holds else dict.fromkeys(names, reason)


def _after_numbers(rules: Callable[[Config], None]) -> Callable[[Config], None]:
    """Returns a ``__post_init__`` that checks the numbers of a config before its rules."""

    @functools.wraps(rules)
    def check(self: Config) -> None:
        require_numbers(self)
        rules(self)

    return check


@dataclass
class RouterContext:
    """State of the run that routers may read. One object, owned by the model, shared by all layers.

    A forward pre-hook of the model fills the batch fields; the training loop fills the step fields.
    Layers read it through `LayerContext`; nothing is global.

    Attributes:
        step: Optimizer steps done so far.
        micro_batch: Index of the micro-batch within the step; statistics are kept per micro-batch, so
            that activation recomputation overwrites them instead of counting twice.
        num_micro_batches: Micro-batches per step (gradient accumulation).
        loss_scale: Factor on a micro-batch's main loss before backward. Balance losses get the same factor,
            so that accumulation does not change the meaning of their coefficient.
        group: Process group over which expert load is counted; None for this rank alone.
        token_ids: ``[B, S]`` ids of the batch, or None.
        padding_mask: ``[B, S]`` bool, True where a token is real, or None when all are.
        keys: Further properties of every token, by name (modality, class, timestep): ``[B, S]``. The caller
            sets them before each forward pass, for routers by key.
        top_k: Layer index to experts per token, where a schedule (`moe.routing.top_k_schedule`) overrides the
            router's own number at this step. Set before each forward pass; read by `LayerContext.top_k`.
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
    """View that one MoE layer has of the run: the shared context and its own index."""

    run: RouterContext
    layer_index: int

    def top_k(self, own: int) -> int:
        """Returns the experts per token at this step: the schedule's, else ``own``, the router's."""
        return self.run.top_k.get(self.layer_index, own)

    def num_sequences(self, num_tokens: int) -> int:
        """Returns the number of (equally long) sequences of T tokens; 1 if the batch is unknown or empty."""
        ids = self.run.token_ids
        return ids.shape[0] if ids is not None and ids.dim() == 2 and ids.numel() == num_tokens > 0 else 1

    def token_mask_T(self, num_tokens: int) -> Tensor | None:
        """Returns ``[T]`` bool, True for real tokens; None without a mask or with another batch's."""
        mask = self.run.padding_mask
        if mask is None or mask.numel() != num_tokens:
            return None
        return mask.reshape(-1)


@dataclass(frozen=True)
class Routing:
    """Decision of a router for T tokens, with the same or a varying number of experts per token.

    Attributes:
        expert_ids_TK: ``[T, K]`` int64 expert of each slot; values in unused slots are ignored.
        weights_TK: ``[T, K]`` combine weights, at least fp32; they carry the gradient to the router.
        num_experts: E.
        slot_mask_TK: ``[T, K]`` bool, False where a slot is unused; None if all are used.
        scores_TE: ``[T, E]`` fp32 dense scores (probabilities), if the router has them.
        logits_TE: ``[T, E]`` fp32 router logits, if the router has them.
        losses: Named scalar losses times their coefficients; the layer attaches their gradient.
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
