"""Qwen3 models as plain Qwen3-MoE, with dense layers among the MoE layers if there are any."""

from __future__ import annotations

from typing import Any

from recipes.models.export.carried import (
    COMMON_KEYS,
    carried_values,
    reason_not_softmax,
    reason_unlike_llama,
    with_old_rope_keys,
)
from recipes.models.export.native_format import NativeExporter
from recipes.models.export.spec import ModelSpec


class Qwen3MoEExporter(NativeExporter):
    """Writes `Qwen3MoeForCausalLM`."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    models = ("qwen3",)

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Rejects all but softmax routers, renormalised or not, without a shared expert."""
        config = spec.config
        if "sliding_attention" in (config.layer_types or ()):
            return "Qwen3-MoE has one attention for all layers, and the model has windows in some"
        if spec.moe_blocks[0].shared_width:
            return "Qwen3-MoE has no shared expert, and this model has"
        return reason_unlike_llama("Qwen3-MoE", spec) or reason_not_softmax(
            "Qwen3-MoE", spec, must_sum_to_one=False
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the config, with the number of experts under both names that readers look for."""
        from transformers import Qwen3MoeConfig

        moe, source = spec.moe_blocks[0], spec.config
        config = Qwen3MoeConfig(
            **carried_values(source, (*COMMON_KEYS, "attention_bias")),
            intermediate_size=source.intermediate_size,
            moe_intermediate_size=moe.expert.width,
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.router.top_k,
            norm_topk_prob=moe.router.weights_sum_to_one,
            router_aux_loss_coef=moe.router.config.balance_coef,
            decoder_sparse_step=1,
            mlp_only_layers=spec.dense_layers,
            use_sliding_window=False,
        )
        config.architectures = ["Qwen3MoeForCausalLM"]
        content = with_old_rope_keys(config.to_dict())
        return content | dict.fromkeys(("num_experts", "num_local_experts"), moe.num_experts)

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """Excludes llama.cpp where it differs: it always renormalises and has no dense layers."""
        found = ["transformers", "vllm"]
        if spec.moe_blocks[0].router.weights_sum_to_one and not spec.dense_layers:
            found.append("llama.cpp")
        return found
