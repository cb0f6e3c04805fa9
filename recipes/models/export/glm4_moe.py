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

from recipes.models.export.native_format import NativeExporter
from recipes.models.export.spec import ModelSpec


class Glm4MoEExporter(NativeExporter):
    """Writes `Glm4MoeForCausalLM`."""

    name = "glm4_moe"
    title = "GLM-4-MoE"
    family = "Glm4Moe"
    models = ("llama", "mistral", "qwen2", "qwen3")
    shared_module = "shared_experts"
    router_keys = {"weight_ED": "weight", "bias_E": "e_score_correction_bias"}

    def model_reason(self, spec: ModelSpec) -> str | None:
        """Rejects other routers, a bias on the attention's output, and windows."""
        config, router = spec.read, spec.moe_blocks[0].router
        if router.name != "deepseek_v3":
            return f"GLM-4-MoE has DeepSeek-V3's router, not {router.name!r}"
        biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        if biased and config.model_type != "qwen2":
            return "GLM-4-MoE has no bias on the output projection, and the model has"
        windows = config.model_type == "mistral" and config.sliding_window is not None
        if windows or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return "GLM-4-MoE has no sliding windows, and the model has"
        return None

    def router_reason(self, spec: ModelSpec) -> str | None:
        """Rejects other scores and groups, dense layers behind MoE ones, and shared experts of odd widths."""
        dense, moe = spec.dense_layers, spec.moe_blocks[0]
        config = moe.router.config
        if config.score != "sigmoid" or config.group_score != "top2_sum":
            return "GLM-4-MoE scores by a sigmoid and groups by their two best, and this router does not"
        if moe.num_experts // config.num_groups < 2:
            return "GLM-4-MoE needs two experts in a group"
        if dense != list(range(len(dense))):
            return f"GLM-4-MoE's dense layers come first, and here layers {dense} are dense"
        if moe.shared_width % moe.expert.width:
            return (
                f"GLM-4-MoE's shared expert is as wide as several routed ones, and {moe.shared_width} is no "
                f"multiple of {moe.expert.width}"
            )
        return None

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the config, with rotary embedding over the whole head."""
        return super().config(spec) | {"partial_rotary_factor": 1.0}

    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """See `NativeExporter.config_values`; norms of queries and keys are as in the model."""
        moe, source = spec.moe_blocks[0], spec.read
        router = moe.router.config
        values = {
            "rope_parameters": dict(source.rope_parameters) | {"partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
            "attention_bias": source.model_type == "qwen2",
            "use_qk_norm": source.model_type == "qwen3",
            "intermediate_size": source.intermediate_size,
            "moe_intermediate_size": moe.expert.width,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_width // moe.expert.width or 1,
            "norm_topk_prob": router.renormalise,
            "routed_scaling_factor": router.routed_scaling,
            "n_group": router.num_groups,
            "topk_group": router.top_groups,
            "first_k_dense_replace": len(spec.dense_layers),
            "num_mtp_layers": 0,
        }
        if not hasattr(source, "head_dim"):
            values["head_dim"] = source.hidden_size // source.num_attention_heads
        return values

    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """See `NativeExporter.differing`."""
        found = {"llama.cpp": "its converter takes GLM-4-MoE with GLM's own tokenizer alone"}
        if spec.read.tie_word_embeddings:
            found["vllm"] = "it leaves the head of a GLM-4-MoE with tied embeddings empty"
        return found

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
