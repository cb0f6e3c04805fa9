"""Llama and Mistral models as plain Mixtral, the format that all readers know.

Tensors have the per-expert names of transformers 4, which version 5 reads and writes as well. All config
values that change the function are carried over: Mixtral's defaults are not Llama's (rope_theta is 1e6, not
1e4).
"""

from __future__ import annotations

from typing import Any

from moe.upcycle.dense_shape import Matrix
from recipes.models.export.native_format import NativeExporter, aux_loss_coef
from recipes.models.export.spec import ModelSpec, MoESpec

_MATRIX_NAMES: dict[Matrix, str] = {"gate": "w1", "up": "w3", "down": "w2"}


class MixtralExporter(NativeExporter):
    """Writes `MixtralForCausalLM`."""

    name = "mixtral"
    title = "Mixtral"
    family = "Mixtral"
    models = ("llama", "mistral")
    layouts = ("per_expert",)
    has_dense_layers = False
    must_sum_to_one = True

    def model_reason(self, spec: ModelSpec) -> str | None:
        """Rejects biases."""
        if getattr(spec.read, "attention_bias", False) or getattr(spec.read, "mlp_bias", False):
            return "Mixtral has no biases, and the model has"
        return None

    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """See `NativeExporter.config_values`."""
        moe = spec.moe_blocks[0]
        return {
            "intermediate_size": moe.expert.width,
            "num_local_experts": moe.num_experts,
            "sliding_window": getattr(spec.read, "sliding_window", None),
            "router_aux_loss_coef": aux_loss_coef(spec),
            "router_jitter_noise": 0.0,
        }

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """Maps gate, up and down to w1, w3 and w2."""
        assert not bias, "Mixtral has no biases; its unsupported_reason says so"
        return f"{_block(moe)}.block_sparse_moe.experts.{expert}.{_MATRIX_NAMES[matrix]}.weight"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """See `Exporter.router_name`."""
        assert key == "weight_ED", key
        return f"{_block(moe)}.block_sparse_moe.gate.weight"

    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """See `NativeExporter.differing`."""
        if getattr(spec.read, "sliding_window", None) is not None:
            return {"llama.cpp": "it ignores Mixtral's sliding window"}
        return {}


def _block(moe: MoESpec) -> str:
    return moe.site.removesuffix(".mlp")
