"""Soft MoE: experts see mixtures of all tokens, and tokens get mixtures of all experts' outputs.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951, Eq. 1-3, Section 2.3
for the normalisation); V-MoE's code for the constants. Mixtures are of one sequence (there: image) each.

Every slot mixes tokens from the whole sequence: not causal, never for language models that generate. Copied
experts are not exact either, since they see mixtures.

Letters: T tokens, D model width, E experts, B sequences, S tokens a sequence, P slots an expert, N = E P
slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.errors import require
from moe.routers.base import Router, RouterConfig
from moe.routing.chosen import sequence_shape
from moe.routing.token_mean import figure_mean
from moe.types import LayerContext, Routing

_EPS = 1e-6


@dataclass(frozen=True)
class SoftMoEConfig(RouterConfig):
    """Config of `SoftMoERouter`."""

    name: Literal["soft_moe"] = "soft_moe"
    slots_per_expert: int = 16
    """Mixtures that each expert sees of a sequence. With S / E of them it costs one expert a token."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.slots_per_expert >= 1,
                "slots_per_expert",
                "an expert sees something",
                "Set it to 1 or more.",
            ),
        )


@dataclass(frozen=True)
class SoftRouting(Routing):
    """A routing whose slots are mixtures. As a `Routing` it says what each token gets of each expert.

    Attributes:
        dispatch_BSN: Shares of the tokens in each slot: they sum to 1 over the real tokens of a sequence.
        combine_BSN: Shares of the slots in each token: they sum to 1 over the slots.
    """

    dispatch_BSN: Tensor | None = None
    combine_BSN: Tensor | None = None


@dataclass(frozen=True)
class SoftDispatched(Dispatched):
    """Slots on their way, and how to get back to tokens.

    Attributes:
        inner: What the dispatcher below has sent.
        combine_BSN: See `SoftRouting`.
    """

    inner: Dispatched
    combine_BSN: Tensor


class SoftMoERouter(Router[SoftMoEConfig]):
    """Softmax over tokens for what goes into a slot, softmax over slots for what comes back.

    Attributes:
        phi_EPD: ``[E, P, D]`` directions of the slots.
        scale: ``[1]`` that the cosines are multiplied by.
    """

    name = "soft_moe"
    config_class = SoftMoEConfig
    is_causal = False
    mixes_tokens = True

    def __init__(self, config: SoftMoEConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.phi_EPD = nn.Parameter(torch.empty(num_experts, config.slots_per_expert, model_width))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """1: what a token costs where there are as many slots as tokens. Every token gets of all experts."""
        return 1

    @property
    def weights_sum_to_one(self) -> bool:
        """False: they do, but copies are not exact, since they see mixtures of tokens."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Normal with variance 1 / D; a scale of 1."""
        nn.init.normal_(self.phi_EPD, std=self.model_width**-0.5, generator=generator)
        nn.init.ones_(self.scale)

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """Mixes before and after it."""
        return SoftDispatcher(dispatcher)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Shares of tokens in slots and of slots in tokens."""
        T, E = len(x_TD), self.num_experts
        B, S = sequence_shape(T, ctx)
        mask_T = ctx.token_mask_T(T)
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            unit_TD = F.normalize(x_TD.to(dtype), dim=-1, eps=_EPS)
            unit_ND = F.normalize(self.phi_EPD.to(dtype), dim=-1, eps=_EPS).flatten(0, 1)
            logits_TN = self.scale.to(dtype) * (unit_TD @ unit_ND.t())
            logits_BSN = logits_TN.view(B, S, len(unit_ND))
            combine_BSN = logits_BSN.softmax(-1)
            if mask_T is None:
                dispatch_BSN = logits_BSN.softmax(1)
            else:
                real_BS1 = mask_T.view(B, S, 1)
                lowest = torch.finfo(dtype).min
                dispatch_BSN = logits_BSN.masked_fill(~real_BS1, lowest).softmax(1) * real_BS1
            shares_TE = combine_BSN.reshape(T, E, self.config.slots_per_expert).sum(-1)
        ids_TE = torch.arange(E, device=x_TD.device).expand(T, E)
        return SoftRouting(
            expert_ids_TK=ids_TE,
            weights_TK=shares_TE,
            num_experts=E,
            slot_mask_TK=torch.ones_like(ids_TE, dtype=torch.bool),
            scores_TE=shares_TE,
            metrics=self._metrics(dispatch_BSN, combine_BSN, ctx) if self.training else {},
            dispatch_BSN=dispatch_BSN,
            combine_BSN=combine_BSN,
        )

    def _metrics(self, dispatch_BSN: Tensor, combine_BSN: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
        if not dispatch_BSN.numel():
            return {}
        most_T = combine_BSN.detach().amax(-1).reshape(-1)
        return {
            "slot_sharpness": dispatch_BSN.detach().amax(1).mean(),
            "token_sharpness": figure_mean(most_T, ctx),
        }


class SoftDispatcher(Dispatcher):
    """Sends mixtures in the place of tokens, by another dispatcher, each slot to its one expert."""

    name = "soft"

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Mixes the tokens of each sequence into slots and sends those."""
        assert isinstance(routing, SoftRouting), type(routing)
        dispatch_BSN, combine_BSN = routing.dispatch_BSN, routing.combine_BSN
        assert dispatch_BSN is not None and combine_BSN is not None, "a soft routing has both shares"
        B, S, N = dispatch_BSN.shape
        D, E = x_TD.shape[1], routing.num_experts
        with torch.autocast(x_TD.device.type, enabled=False):
            x_BSD = x_TD.to(dispatch_BSN.dtype).view(B, S, D)
            slots_MD = (dispatch_BSN.transpose(1, 2) @ x_BSD).reshape(B * N, D).to(x_TD.dtype)
        expert_N = torch.arange(E, device=x_TD.device).repeat_interleave(N // E)
        ones_M1 = torch.ones(B * N, 1, dtype=dispatch_BSN.dtype, device=x_TD.device)
        handle = self.inner.start(slots_MD, Routing(expert_N.repeat(B)[:, None], ones_M1, E))

        def arrive() -> Dispatched:
            inner = handle()
            return SoftDispatched(
                inner.rows_ND, inner.weights_NK, inner.plan, inner=inner, combine_BSN=combine_BSN
            )

        return arrive

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings the slots home and mixes them into tokens."""
        assert isinstance(sent, SoftDispatched), type(sent)
        y_MD, combine_BSN = self.inner.combine(y_ND, sent.inner), sent.combine_BSN
        B, _, N = combine_BSN.shape
        with torch.autocast(y_MD.device.type, enabled=False):
            out_BSD = combine_BSN @ y_MD.to(combine_BSN.dtype).view(B, N, -1)
        return out_BSD.flatten(0, 1).to(y_MD.dtype)
