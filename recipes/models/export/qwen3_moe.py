"""Qwen3 models as plain Qwen3-MoE, with dense layers among the MoE layers if there are any."""

from __future__ import annotations

from typing import Any

from recipes.models.export.native_format import COMMON_KEYS, NativeExporter, aux_loss_coef
from recipes.models.export.spec import ModelSpec


class Qwen3MoEExporter(NativeExporter):
    """Writes `Qwen3MoeForCausalLM`."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    family = "Qwen3Moe"
    models = ("qwen3",)
    config_keys = (*COMMON_KEYS, "attention_bias")

    def model_reason(self, spec: ModelSpec) -> str | None:
        """Rejects windows in some of the layers."""
        if "sliding_attention" in (spec.read.layer_types or ()):
            return "Qwen3-MoE has one attention for all layers, and the model has windows in some"
        return None

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the config, with the number of experts under both names that readers look for."""
        names = ("num_experts", "num_local_experts")
        return super().config(spec) | dict.fromkeys(names, spec.moe_blocks[0].num_experts)

    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """See `NativeExporter.config_values`."""
        return qwen_values(spec)

    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """See `NativeExporter.differing`."""
        found = {}
        if not spec.moe_blocks[0].router.weights_sum_to_one:
            found["llama.cpp"] = "it always renormalises Qwen3-MoE's gates"
        if spec.dense_layers:
            found["llama.cpp"] = "its Qwen3-MoE has no dense layers"
        if spec.read.attention_bias:
            reason = "its Qwen3-MoE has no bias on the attention's output"
            found |= dict.fromkeys(("vllm", "llama.cpp"), reason)
        return found


def qwen_values(spec: ModelSpec) -> dict[str, Any]:
    """Returns the config values that Qwen2-MoE and Qwen3-MoE share.

    The flag for renormalisation is always written, since readers' defaults differ.
    """
    moe = spec.moe_blocks[0]
    return {
        "intermediate_size": spec.read.intermediate_size,
        "moe_intermediate_size": moe.expert.width,
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.router.weights_sum_to_one,
        "router_aux_loss_coef": aux_loss_coef(spec),
        "decoder_sparse_step": 1,
        "mlp_only_layers": spec.dense_layers,
        "use_sliding_window": False,
    }
