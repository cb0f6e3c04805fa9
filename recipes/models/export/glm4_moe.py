"""Llama, Qwen2 and Qwen3 models with DeepSeek-V3's router as plain GLM-4-MoE.

GLM-4-MoE has DeepSeek-V3's MoE layer (sigmoid scores, a selection bias, groups, scaled weights, a shared
expert) with grouped-query attention, so that it can hold models that DeepSeek's class, with latent attention,
cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recipes.models.export.carried import (
    carried_values,
    reason_unlike_llama,
    with_old_rope_keys,
)
from recipes.models.export.native_format import NativeExporter
from recipes.models.export.spec import ModelSpec


class Glm4MoEExporter(NativeExporter):
    """Writes `Glm4MoeForCausalLM`."""

    name = "glm4_moe"
    title = "GLM-4-MoE"
    models = ("llama", "mistral", "qwen2", "qwen3")
    shared_module = "shared_experts"
    router_keys = {"weight_ED": "weight", "bias_E": "e_score_correction_bias"}

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Rejects other routers, dense layers behind MoE layers, and shared experts of other widths."""
        config, moe = spec.config, spec.moe_blocks[0]
        if moe.router.name != "deepseek_v3":
            return f"GLM-4-MoE has DeepSeek-V3's router, not {moe.router.name!r}"
        return (
            _attention_reason(config)
            or reason_unlike_llama("GLM-4-MoE", spec)
            or _router_reason(spec)
            or _layers_reason(spec)
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the config, with rotary embedding over the whole head and the model's norms of q and k."""
        from transformers import Glm4MoeConfig

        moe, source = spec.moe_blocks[0], spec.config
        router = moe.router.config
        values = carried_values(source)
        values["rope_parameters"] = dict(values["rope_parameters"]) | {"partial_rotary_factor": 1.0}
        values.setdefault("head_dim", source.hidden_size // source.num_attention_heads)
        config = Glm4MoeConfig(
            **values,
            partial_rotary_factor=1.0,
            attention_bias=source.model_type == "qwen2",
            use_qk_norm=source.model_type == "qwen3",
            intermediate_size=source.intermediate_size,
            moe_intermediate_size=moe.expert.width,
            n_routed_experts=moe.num_experts,
            n_shared_experts=moe.shared_width // moe.expert.width or 1,
            num_experts_per_tok=moe.router.top_k,
            norm_topk_prob=router.renormalise,
            routed_scaling_factor=router.routed_scaling,
            n_group=router.num_groups,
            topk_group=router.top_groups,
            first_k_dense_replace=len(spec.dense_layers),
            num_mtp_layers=0,
        )
        config.architectures = ["Glm4MoeForCausalLM"]
        return with_old_rope_keys(config.to_dict()) | {"partial_rotary_factor": 1.0}

    def constants(self, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """Yields a shared expert of zeros if the model has none: the class always has one."""
        for moe in spec.moe_blocks:
            if moe.shared_width:
                continue
            F, D = moe.expert.width, moe.expert.model_width
            for matrix in ("gate", "up"):
                yield f"{moe.site}.shared_experts.{matrix}_proj.weight", torch.zeros(F, D)
            yield f"{moe.site}.shared_experts.down_proj.weight", torch.zeros(D, F)

    def keeps_dtype(self, name: str) -> bool:
        """Keeps the selection bias: it moves by 1e-3, which bf16 rounds away; the class has it in fp32."""
        return name.endswith("e_score_correction_bias")

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """Lists transformers alone: other readers of this class were not examined."""
        return ["transformers"]


def _attention_reason(config: Any) -> str | None:
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if biased and config.model_type != "qwen2":
        return "GLM-4-MoE has no bias on the output projection, and the model has"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "GLM-4-MoE has no sliding windows, and the model has"
    if config.model_type == "mistral" and config.sliding_window is not None:
        return "GLM-4-MoE has no sliding windows, and the model has"
    return None


def _router_reason(spec: ModelSpec) -> str | None:
    moe = spec.moe_blocks[0]
    config = moe.router.config
    if config.score != "sigmoid" or config.group_score != "top2_sum":
        return "GLM-4-MoE scores by a sigmoid and groups by their two best, and this router does not"
    if moe.num_experts // config.num_groups < 2:
        return "GLM-4-MoE needs two experts in a group"
    return None


def _layers_reason(spec: ModelSpec) -> str | None:
    dense, moe = spec.dense_layers, spec.moe_blocks[0]
    if dense != list(range(len(dense))):
        return f"GLM-4-MoE's dense layers come first, and here layers {dense} are dense"
    if moe.shared_width % moe.expert.width:
        return (
            f"GLM-4-MoE's shared expert is as wide as several routed ones, and {moe.shared_width} is no "
            f"multiple of {moe.expert.width}"
        )
    return None
