"""CMoE: neurons that are often among the most active are shared, the others grouped by who activates them.

Source: Pei et al. 2025 (arXiv 2502.04416). No training is needed to begin: the router is a neuron of each
group (`moe.routers.analytical`), and every chosen expert weighs 1. The paper carves a layer after the layers
below it; here all layers are measured in the dense model, in one pass.

Letters: E routed experts, F width of the dense network or of an expert, S tokens sampled, K marks of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Draws, FFNShape, LayerPlan, NeuronRows, RouterStart
from moe.upcycle.neuron_split import marker_groups
from moe.upcycle.partition import parts_plan

_ROUTER = "analytical"


@dataclass(frozen=True)
class CMoEConfig(UpcycleConfig):
    """Config of `CMoE`."""

    name: Literal["cmoe"] = "cmoe"
    num_experts: int = 14
    """Routed experts."""
    num_shared: int = 2
    """Width of the shared expert in widths of a routed one; 0 for none."""
    activation_top_k: int = 10
    """Neurons that a token marks."""
    marker_tokens: int = 4096
    """Tokens whose marks the groups are made by; rates are counted over the whole text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            *(
                (getattr(self, name) >= low, name, f"must be at least {low}", "Raise it.")
                for name, low in (("num_shared", 0), ("activation_top_k", 1), ("marker_tokens", 1))
            ),
        )


class CMoE(UpcycleMethod[CMoEConfig]):
    """A shared expert by activation rate, routed ones by marks."""

    name = "cmoe"
    config_class = CMoEConfig
    starts_router = True

    @property
    def statistics(self) -> tuple[str, ...]:
        """Rates, and marks of a sample."""
        return ("activation_rate_F", "markers_TK")

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Of both."""
        top_k = self.config.activation_top_k
        return {
            "activation_rate_F": {"top_k": top_k},
            "markers_TK": {"top_k": top_k, "num_tokens": self.config.marker_tokens},
        }

    def is_exact(self, router: Router[Any]) -> bool:
        """Where every token uses every expert, as long as the router has not been trained."""
        return router.weighs_one and router.top_k == router.num_experts

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Parts of one width, and CMoE's own router."""
        config, found = self.config, []
        if router.name != _ROUTER:
            rule = "its experts are chosen by their own neurons, which no other router has"
            found.append(Mistake("router.name", router.name, rule, f"Set router={_ROUTER}."))
        parts = config.num_experts + config.num_shared
        if shape is not None and shape.width % parts:
            rule = f"the {shape.width} neurons of the dense network do not divide into {parts} parts"
            remedy = "Set another number, or another num_shared."
            found.append(Mistake("upcycle.num_experts", config.num_experts, rule, remedy))
        return found

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Carves a layer."""
        config, rate_F = self.config, statistics["activation_rate_F"]
        width = shape.width // (config.num_experts + config.num_shared)
        order_F = rate_F.argsort(descending=True, stable=True)
        count = config.num_shared * width
        shared_F, left_F = order_F[:count].sort().values, order_F[count:].sort().values
        mark_SF = marks_of(statistics["markers_TK"], shape.width)[:, left_F]
        groups_EM, member_E = marker_groups(mark_SF, rate_F[left_F], config.num_experts)
        plan = parts_plan(list(left_F[groups_EM]), 1.0, self.gates, shared_F if count else None)
        neurons_E1 = left_F[member_E][:, None]
        # Without a gate the score is |act(z) z| of the neuron's z, which orders tokens as |act(z)| does.
        gate: Literal["gate", "up"] = "gate" if shape.gated else "up"
        rows = {"gate_ED": NeuronRows(gate, neurons_E1), "up_ED": NeuronRows("up", neurons_E1)}
        return replace(plan, router=RouterStart(tensors=rows))


def marks_of(markers_SK: Tensor, width: int) -> Tensor:
    """``[S, F]`` fp32: 1 where a token marks a neuron, of the neurons that each marks."""
    return torch.zeros(len(markers_SK), width).scatter_(1, markers_SK.long(), 1.0)
