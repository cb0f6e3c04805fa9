"""Llama and Mistral models as plain Mixtral, the format that all readers know.

Tensors have the per-expert names of transformers 4, which version 5 reads and writes as well. All config
values that change the function are carried over: Mixtral's defaults are not Llama's (rope_theta is 1e6, not
1e4).
"""

from __future__ import annotations

from typing import Any

from moe.upcycle.layer_plan import Matrix
from recipes.models.export.carried import (
    block_of,
    carried_values,
    reason_not_softmax,
    reason_unlike_llama,
    with_old_rope_keys,
)
from recipes.models.export.native_format import NativeExporter
from recipes.models.export.spec import ModelSpec, MoESpec

_MATRIX_NAMES: dict[Matrix, str] = {"gate": "w1", "up": "w3", "down": "w2"}


class MixtralExporter(NativeExporter):
    """Writes `MixtralForCausalLM`."""

    name = "mixtral"
    title = "Mixtral"
    models = ("llama", "mistral")
    layouts = ("per_expert",)

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Rejects all but softmax routers whose weights sum to 1, in every block, without biases."""
        config = spec.config
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "Mixtral has no biases, and the model has"
        if spec.dense_layers:
            count = len(spec.moe_blocks)
            return f"Mixtral has no dense layers, and {count} of {spec.num_layers} are MoE layers"
        if spec.moe_blocks[0].shared_width:
            return "Mixtral has no shared expert, and this model has"
        return reason_unlike_llama("Mixtral", spec) or reason_not_softmax(
            "Mixtral", spec, must_sum_to_one=True
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds Mixtral's config with all values carried over that change the function."""
        from transformers import MixtralConfig

        moe, source = spec.moe_blocks[0], spec.config
        config = MixtralConfig(
            **carried_values(source),
            intermediate_size=moe.expert.width,
            num_local_experts=moe.num_experts,
            num_experts_per_tok=moe.router.top_k,
            sliding_window=getattr(source, "sliding_window", None),
            router_aux_loss_coef=moe.router.config.balance_coef,
            router_jitter_noise=0.0,
        )
        config.architectures = ["MixtralForCausalLM"]
        return with_old_rope_keys(config.to_dict())

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """Maps gate, up and down to w1, w3 and w2."""
        assert not bias, "Mixtral has no biases; its unsupported_reason says so"
        return f"{block_of(moe)}.block_sparse_moe.experts.{expert}.{_MATRIX_NAMES[matrix]}.weight"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """See `Exporter.router_name`."""
        assert key == "weight_ED", key
        return f"{block_of(moe)}.block_sparse_moe.gate.weight"

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """Lists three programs, which all renormalise; llama.cpp's converter knows names and tied heads."""
        return ["transformers", "vllm", "llama.cpp"]
