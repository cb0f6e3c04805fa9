"""OLMo2 models as plain FlexOlmo, which has the same norms in the same places."""

from __future__ import annotations

from typing import Any

from recipes.models.export.native_format import COMMON_KEYS, NativeExporter, aux_loss_coef
from recipes.models.export.spec import ModelSpec


class FlexOlmoExporter(NativeExporter):
    """Writes `FlexOlmoForCausalLM`."""

    name = "flex_olmo"
    title = "FlexOlmo"
    family = "FlexOlmo"
    models = ("olmo2",)
    config_keys = (*COMMON_KEYS, "attention_bias")
    has_dense_layers = False

    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """See `NativeExporter.differing`."""
        return {"llama.cpp": "it has no FlexOlmo"}

    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """See `NativeExporter.config_values`."""
        moe = spec.moe_blocks[0]
        return {
            "intermediate_size": moe.expert.width,
            "num_experts": moe.num_experts,
            "norm_topk_prob": moe.router.weights_sum_to_one,
            "router_aux_loss_coef": aux_loss_coef(spec),
        }
