"""Soft MoE: experts see averages of all tokens, and tokens get averages of all experts' outputs.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951, Eq. 1-3, Section 2.3
for the normalisation); V-MoE's code for the constants. Each average stays within one sequence (there: image).

Every slot mixes tokens from the whole sequence, so it is not causal: never use it for language models that
generate. Copied experts are not exact either, since they see averages.

Letters: T tokens, D model width, E experts, B sequences, S tokens a sequence, P slots an expert, N = E P
slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.routers.base import Router
from moe.routers.configs.soft_moe_config import SoftMoEConfig
from moe.routing.balance import figure_mean
from moe.routing.slots import sequence_shape
from moe.types import LayerContext, Routing

_EPS = 1e-6


@dataclass(frozen=True)
class SoftRouting(Routing):
    """Routing whose slots are averages of tokens; as a `Routing` it holds each expert's share in each token.

    Attributes:
        dispatch_BSN: Shares of the tokens in each slot; they sum to 1 over the real tokens of a sequence.
        combine_BSN: Shares of the slots in each token; they sum to 1 over the slots.
    """

    dispatch_BSN: Tensor | None = None
    combine_BSN: Tensor | None = None


@dataclass(frozen=True)
class SoftDispatched(Dispatched):
    """Slots that arrived at the experts, with the shares that turn them back into tokens.

    Attributes:
        inner: Result of the wrapped dispatcher.
        combine_BSN: See `SoftRouting`.
    """

    inner: Dispatched
    combine_BSN: Tensor


class SoftMoERouter(Router[SoftMoEConfig]):
    """Router by softmax over tokens into slots, and by softmax over slots back into tokens.

    K is 1: a token costs one expert if there are as many slots as tokens, though it uses all experts.

    Attributes:
        phi_EPD: ``[E, P, D]`` directions of the slots.
        scale: ``[1]`` factor on the cosines.
    """

    name = "soft_moe"
    config_class = SoftMoEConfig
    is_causal = False

    def create_parameters(self) -> None:
        """Registers directions and scale."""
        shape = (self.num_experts, self.config.slots_per_expert, self.model_width)
        self.phi_EPD = nn.Parameter(torch.empty(shape))
        self.scale = nn.Parameter(torch.empty(1))

    @property
    def weights_sum_to_one(self) -> bool:
        """False, although they do: copies are not exact, since they see averages of tokens."""
        return False

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws directions, normal with variance 1 / D; sets the scale to 1."""
        nn.init.normal_(self.phi_EPD, std=self.model_width**-0.5, generator=generator)
        nn.init.ones_(self.scale)

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """Wraps the dispatcher, to average before and after it."""
        return SoftDispatcher(dispatcher)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Computes the shares of tokens in slots and of slots in tokens."""
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
            ids_TE,
            shares_TE,
            E,
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


@dataclass(frozen=True)
class _SoftHandle(DispatchHandle):
    """Slots on their way.

    Attributes:
        inner: Handle of the wrapped dispatcher.
        combine_BSN: See `SoftRouting`.
    """

    inner: DispatchHandle
    combine_BSN: Tensor

    def wait(self) -> Dispatched:
        """See `DispatchHandle.wait`."""
        inner = self.inner.wait()
        return SoftDispatched(inner.rows_ND, inner.weights_NK, inner.plan, inner, self.combine_BSN)


class SoftDispatcher(Dispatcher):
    """Dispatcher that averages tokens into slots and sends those through another dispatcher."""

    name = "soft"

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Averages the tokens of each sequence into slots and sends those."""
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
        slots = Routing(expert_N.repeat(B)[:, None], ones_M1, E)
        return _SoftHandle(self.inner.start(slots_MD, slots), combine_BSN)

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings the slots home and averages them into tokens."""
        assert isinstance(sent, SoftDispatched), type(sent)
        y_MD, combine_BSN = self.inner.combine(y_ND, sent.inner), sent.combine_BSN
        B, _, N = combine_BSN.shape
        with torch.autocast(y_MD.device.type, enabled=False):
            out_BSD = combine_BSN @ y_MD.to(combine_BSN.dtype).view(B, N, -1)
        return out_BSD.flatten(0, 1).to(y_MD.dtype)
