"""Qwen2 models as plain Qwen2-MoE, which always has a gated shared expert.

The gate is a sigmoid of ``x w``: with w = 0 it is 1/2, so the shared expert's down projection is written
doubled. A model without a shared expert gets one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe.upcycle.dense_shape import Matrix
from recipes.models.export.native_format import COMMON_KEYS, NativeExporter
from recipes.models.export.qwen3_moe import qwen_values
from recipes.models.export.spec import ModelSpec, MoESpec

# Width of a shared expert of zeros: quantisers and tensor parallelism want a multiple of 256.
_IDLE_WIDTH = 256


class Qwen2MoEExporter(NativeExporter):
    """Writes `Qwen2MoeForCausalLM`."""

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    family = "Qwen2Moe"
    models = ("qwen2",)
    config_keys = tuple(key for key in COMMON_KEYS if key != "head_dim")
    shared_module = "shared_expert"

    def model_reason(self, spec: ModelSpec) -> str | None:
        """Rejects windows in some of the layers, and heads that do not divide the hidden size."""
        config = spec.read
        if "sliding_attention" in (config.layer_types or ()):
            return "Qwen2-MoE counts layers with windows differently, and the model has such layers"
        head_dim = getattr(config, "head_dim", None)
        if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
            return "Qwen2-MoE's heads divide the hidden size, and the model's do not"
        return None

    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """See `NativeExporter.config_values`."""
        width = spec.moe_blocks[0].shared_width or _IDLE_WIDTH
        return qwen_values(spec) | {"shared_expert_intermediate_size": width, "qkv_bias": True}

    def factor(self, moe: MoESpec, expert: int | None, matrix: Matrix) -> float:
        """Returns the factor that undoes the gate of 1/2."""
        return 2.0 if expert is None and matrix == "down" else 1.0

    def constants(self, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """Yields the shared experts' gates, and shared experts of zeros if the model has none."""
        for moe in spec.moe_blocks:
            D = moe.expert.model_width
            # Over a shared expert of zeros any gate will do, and one reader divides by it.
            gate = torch.zeros(1, D) if moe.shared_width else torch.full((1, D), 1e-3)
            yield f"{moe.site}.shared_expert_gate.weight", gate
            if not moe.shared_width:
                for matrix in ("gate", "up"):
                    yield f"{moe.site}.shared_expert.{matrix}_proj.weight", torch.zeros(_IDLE_WIDTH, D)
                yield f"{moe.site}.shared_expert.down_proj.weight", torch.zeros(D, _IDLE_WIDTH)

    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """See `NativeExporter.differing`."""
        moe = spec.moe_blocks[0]
        reasons = {
            "it never renormalises Qwen2-MoE's gates": moe.router.weights_sum_to_one,
            "its Qwen2-MoE has no dense layers": spec.dense_layers,
            "it divides by the gate of Qwen2-MoE's shared expert, which is 0": moe.shared_width,
            "its Qwen2-MoE has no tied embeddings": spec.read.tie_word_embeddings,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        return {"llama.cpp": found[0]} if found else {}
