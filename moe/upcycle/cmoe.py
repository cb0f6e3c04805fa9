"""CMoE: neurons that are often among the most active are shared, the others grouped by the tokens they mark.

Source: Pei et al. 2025 (arXiv 2502.04416). It works without training: the router is a neuron of each group
(`moe.routers.analytical`), and every chosen expert weighs 1. The paper converts a layer after the layers
below it; here all layers are measured in the dense model, in one pass.

Letters: E routed experts, F width of the dense network or of an expert, S sampled tokens, K marks of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.cmoe_config import CMoEConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws, LayerPlan, NeuronRows, RouterStart
from moe.upcycle.neuron_split import marker_groups
from moe.upcycle.partition import parts_plan


class CMoE(UpcycleMethod[CMoEConfig]):
    """Method that makes a shared expert by activation rate and routed ones by marks."""

    name = "cmoe"
    config_class = CMoEConfig

    @property
    def statistics(self) -> tuple[str, ...]:
        """Activation rates, and the marks of a sample."""
        return ("activation_rate_F", "markers_TK")

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Options of both statistics."""
        top_k = self.config.activation_top_k
        return {
            "activation_rate_F": {"top_k": top_k},
            "markers_TK": {"top_k": top_k, "num_tokens": self.config.marker_tokens},
        }

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True if every token uses every expert, while the router is untrained."""
        return router.weighs_one and router.top_k == router.num_experts

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Divides a layer's neurons."""
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
    """Returns ``[S, F]`` fp32, 1 where a token marks a neuron, made from each token's marked neurons."""
    return torch.zeros(len(markers_SK), width).scatter_(1, markers_SK.long(), 1.0)
