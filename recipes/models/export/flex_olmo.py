"""OLMo2 models as plain FlexOlmo, which has the same norms in the same places."""

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


class FlexOlmoExporter(NativeExporter):
    """Writes `FlexOlmoForCausalLM`."""

    name = "flex_olmo"
    title = "FlexOlmo"
    models = ("olmo2",)

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Rejects all but softmax routers, renormalised or not, in every block."""
        if spec.dense_layers:
            count = len(spec.moe_blocks)
            return f"FlexOlmo has no dense layers, and {count} of {spec.num_layers} are MoE layers"
        if spec.moe_blocks[0].shared_width:
            return "FlexOlmo has no shared expert, and this model has"
        return reason_unlike_llama("FlexOlmo", spec) or reason_not_softmax(
            "FlexOlmo", spec, must_sum_to_one=False
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the dense model's config with experts."""
        from transformers import FlexOlmoConfig

        moe = spec.moe_blocks[0]
        config = FlexOlmoConfig(
            **carried_values(spec.config, (*COMMON_KEYS, "attention_bias")),
            intermediate_size=moe.expert.width,
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.router.top_k,
            norm_topk_prob=moe.router.weights_sum_to_one,
            router_aux_loss_coef=moe.router.config.balance_coef,
        )
        config.architectures = ["FlexOlmoForCausalLM"]
        return with_old_rope_keys(config.to_dict())

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """Lists transformers alone: no other reader is known to support this family."""
        return ["transformers"]
