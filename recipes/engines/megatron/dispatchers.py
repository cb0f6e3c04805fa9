"""Megatron's dispatchers, which send tokens to the ranks of their experts and bring the results back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from moe.errors import Mistake
from moe.routers.configs import RouterConfig
from recipes.engines.megatron.packages import find_optional

_PATH = "engine.dispatcher"
_REMEDY = "Set engine.dispatcher=alltoall."
# Lanes of a warp: DeepEP's kernels use one for each expert of a token.
_DEEPEP_MOST = 32


@dataclass(frozen=True)
class DispatchSetup:
    """Conditions under which a dispatcher has to work.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: Dtype of matrix products, ``fp32`` or ``bf16``.
        ranks: Number of ranks that together hold the experts of a layer.
    """

    device: str
    precision: str
    ranks: int


class Dispatcher:
    """Dispatcher of Megatron's all-to-all over torch.distributed, for every device; base of the others.

    Attributes:
        name: Value of ``engine.dispatcher`` that picks it.
        summary: How tokens travel, in a few words.
    """

    name = "alltoall"
    summary = "an all-to-all of the rows of each expert"

    def mistakes(self, setup: DispatchSetup) -> list[Mistake]:
        """Returns the reasons why it cannot be used on this machine."""
        return []

    def route_mistakes(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Returns the reasons why it cannot send tokens to what a router chooses among the experts."""
        return []

    def most_experts(self, num_experts: int, top_k: int) -> int | None:
        """Returns the largest number of experts that it can send a token to; None for all.

        Args:
            num_experts: Number of experts of a layer.
            top_k: Number of experts that the router chooses for a token, at most or in the mean.
        """
        return None

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """Returns fields of Megatron's ``TransformerConfig``; arguments as for `most_experts`."""
        return {"moe_token_dispatcher_type": self.name, "moe_router_topk": top_k}


class AllGather(Dispatcher):
    """Dispatcher that gives every rank all tokens and sums the results: low latency, many bytes."""

    name = "allgather"
    summary = "an all-gather of all tokens"


class _DeepEPKernels(Dispatcher):
    """Base of the dispatchers of DeepEP, whose kernels permute and send at once."""

    backend: str
    attribute: str

    def mistakes(self, setup: DispatchSetup) -> list[Mistake]:
        """Requires the package, GPUs, several ranks, and a dtype that it can add."""
        rules = []
        if setup.device != "cuda":
            rules.append(f"its kernels run on GPUs, and the run on {setup.device}")
        if setup.ranks == 1:
            rules.append("engine.expert_parallel=1 leaves every expert on every rank: nothing travels")
        if setup.precision != "bf16":
            rules.append(f"its kernels add bf16 alone, and engine.precision is {setup.precision}")
        if not rules:
            buffer, trouble = find_optional("deep_ep", self.attribute)
            trouble = trouble or self._trouble(buffer, setup.ranks)
            rules += [f"DeepEP cannot be used here ({trouble})"] if trouble else []
        return [Mistake(_PATH, self.name, rule, _REMEDY) for rule in rules]

    def _trouble(self, buffer: Any, ranks: int) -> str | None:
        """Returns why the class of buffers does not support this number of ranks, or None."""
        return None

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """See `Dispatcher.fields`."""
        return {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": self.backend,
            "moe_router_topk": self.most_experts(num_experts, top_k) or top_k,
        }


class DeepEP(_DeepEPKernels):
    """Dispatcher that sends a token once to each rank that has an expert for it."""

    name = backend = "deepep"
    attribute = "Buffer"
    summary = "DeepEP, a token once to each rank"

    def _trouble(self, buffer: Any, ranks: int) -> str | None:
        try:
            buffer.get_dispatch_config(ranks)
        except AssertionError as error:
            return f"engine.expert_parallel={ranks}: {error}"
        return None

    def route_mistakes(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Requires the chosen experts to have the largest weights, if there are more than lanes of a warp."""
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
        """Returns how many of a token's largest weights Megatron takes: all, if the kernels hold as many."""
        return num_experts if num_experts <= _DEEPEP_MOST else min(top_k, _DEEPEP_MOST)

    def fields(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """See `Dispatcher.fields`."""
        # With a capacity, which nothing else reads here, no token is sent to experts of weight 0.
        return super().fields(num_experts, top_k) | {"moe_expert_capacity_factor": float(num_experts)}


class HybridEP(_DeepEPKernels):
    """Dispatcher of DeepEP's branch for large NVLink domains; rows arrive sorted by expert."""

    name = backend = "hybridep"
    attribute = "HybridEPBuffer"
    summary = "HybridEP, rows sorted on their way"


def dispatchers() -> dict[str, Dispatcher]:
    """Returns every dispatcher by name."""
    return {each.name: each for each in (Dispatcher(), AllGather(), DeepEP(), HybridEP())}


def free_buffers() -> None:
    """Frees DeepEP's buffers, which Megatron would keep for an engine with other groups. Collective."""
    fused = sys.modules.get("megatron.core.transformer.moe.fused_a2a")
    if fused is not None:
        fused._buffer = None  # type: ignore[attr-defined]
        fused.reset_hybrid_ep_buffer()
