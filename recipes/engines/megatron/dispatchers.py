"""Megatron's dispatchers: what takes tokens to the ranks of their experts and brings results back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from moe.errors import Mistake
from moe.routers import RouterConfig
from recipes.engines.megatron.packages import find_optional

_PATH = "engine.dispatcher"
_REMEDY = "Set engine.dispatcher=alltoall."
# Lanes of a warp: each of DeepEP's kernels has one for every expert of a token.
_DEEPEP_MOST = 32


@dataclass(frozen=True)
class Spread:
    """What a dispatcher is asked to work with.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: Of matrix products, ``fp32`` or ``bf16``.
        ranks: That hold the experts of a layer between them.
    """

    device: str
    precision: str
    ranks: int


class Dispatcher:
    """Megatron's all-to-all over torch.distributed, on every device.

    Attributes:
        name: The value of ``engine.dispatcher`` that picks it.
        told: How tokens travel, in some words.
    """

    name = "alltoall"
    told = "an all-to-all of the rows of each expert"

    def mistakes(self, spread: Spread) -> list[Mistake]:
        """Why it cannot be used on this machine, for such a spread."""
        return []

    def route_mistakes(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Why it cannot send what a router chooses among so many experts."""
        return []

    def most_experts(self, num_experts: int, top_k: int) -> int | None:
        """How many experts of a token it can send it to; None for all.

        Args:
            num_experts: Of a layer.
            top_k: That the router chooses for a token, at most or in the mean.
        """
        return None

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """Of Megatron's ``TransformerConfig``; arguments as for `most_experts`."""
        return {"moe_token_dispatcher_type": "alltoall", "moe_router_topk": top_k}


class AllGather(Dispatcher):
    """Every rank gets the tokens of all, and their results are summed: little latency, many bytes."""

    name = "allgather"
    told = "an all-gather of all tokens"

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """See `Dispatcher.fields`."""
        return {"moe_token_dispatcher_type": "allgather", "moe_router_topk": top_k}


class _Fused(Dispatcher):
    """Kernels of DeepEP, which permute and send at once."""

    backend: str
    attribute: str

    def mistakes(self, spread: Spread) -> list[Mistake]:
        """It must be there, with GPUs, several ranks to send between, and a type that it can add."""
        rules = []
        if spread.device != "cuda":
            rules.append(f"its kernels run on GPUs, and the run on {spread.device}")
        if spread.ranks == 1:
            rules.append("engine.expert_parallel=1 leaves every expert on every rank: nothing travels")
        if spread.precision != "bf16":
            rules.append(f"its kernels add bf16 alone, and engine.precision is {spread.precision}")
        if not rules:
            buffer, trouble = find_optional("deep_ep", self.attribute)
            trouble = trouble or self._trouble(buffer, spread.ranks)
            rules += [f"DeepEP cannot be used here ({trouble})"] if trouble else []
        return [Mistake(_PATH, self.name, rule, _REMEDY) for rule in rules]

    def _trouble(self, buffer: Any, ranks: int) -> str | None:
        """Why its class of buffers does not take so many ranks."""
        return None

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """See `Dispatcher.fields`."""
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": self.backend,
            "moe_router_topk": self.most_experts(num_experts, top_k) or top_k,
        }


class DeepEP(_Fused):
    """A token goes once to each rank that has an expert for it."""

    name = backend = "deepep"
    attribute = "Buffer"
    told = "DeepEP, a token once to each rank"

    def _trouble(self, buffer: Any, ranks: int) -> str | None:
        try:
            buffer.get_dispatch_config(ranks)
        except AssertionError as error:
            return f"engine.expert_parallel={ranks}: {error}"
        return None

    def route_mistakes(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Among more experts than its kernels hold, those of the largest weights must be those chosen."""
        if num_experts <= _DEEPEP_MOST or not (
            router.name == "mod" and getattr(router, "gate", "") == "linear"
        ):
            return []
        rule = (
            f"of more than {_DEEPEP_MOST} experts it sends to those of the largest weights, and router=mod "
            "with gate=linear gives negative ones"
        )
        return [Mistake(_PATH, self.name, rule, "Set router.gate=sigmoid, or engine.dispatcher=alltoall.")]

    def most_experts(self, num_experts: int, top_k: int) -> int:
        """Megatron takes so many of a token's largest weights: all where its kernels hold as many."""
        return num_experts if num_experts <= _DEEPEP_MOST else min(top_k, _DEEPEP_MOST)

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """See `Dispatcher.fields`."""
        # With a capacity, which nothing else reads here, experts of weight 0 are not sent to.
        return super().fields(num_experts, top_k) | {"moe_expert_capacity_factor": float(num_experts)}


class HybridEP(_Fused):
    """DeepEP's branch for large domains of NVLink; rows arrive sorted by expert."""

    name = backend = "hybridep"
    attribute = "HybridEPBuffer"
    told = "HybridEP, rows sorted on their way"


def dispatchers() -> dict[str, Dispatcher]:
    """Every dispatcher by name."""
    return {each.name: each for each in (Dispatcher(), AllGather(), DeepEP(), HybridEP())}


def free_buffers() -> None:
    """Frees the memory that DeepEP sends through, which Megatron keeps for as long as the process lives.

    Collective. The next engine has other groups.
    """
    fused = sys.modules.get("megatron.core.transformer.moe.fused_a2a")
    if fused is not None:
        fused._buffer = None  # type: ignore[attr-defined]
        fused.reset_hybrid_ep_buffer()
