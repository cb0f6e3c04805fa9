"""Llama and Mistral hosts as plain Mixtral: the format that everything reads.

Tensors have the per-expert names of transformers 4, which version 5 reads and writes as well.
Everything that changes the function travels along: Mixtral's defaults are not Llama's (rope_theta is 1e6
there and 1e4 here).
"""

from __future__ import annotations

from typing import Any

from moe.upcycle.layer_plan import Matrix
from recipes.models.export.carried import (
    block_of,
    carried_values,
    refuse_other_than_softmax,
    refuse_unlike_llama,
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
        """Mixtral has a softmax router whose weights sum to 1, in every block, and no biases."""
        config = spec.config
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "Mixtral has no biases, and the host has"
        if spec.dense_layers:
            count = len(spec.moe_blocks)
            return f"Mixtral has no dense layers, and {count} of {spec.num_layers} are mixtures"
        if spec.moe_blocks[0].shared_width:
            return "Mixtral has no shared expert, and this mixture has"
        return refuse_unlike_llama("Mixtral", spec) or refuse_other_than_softmax(
            "Mixtral", spec, must_sum_to_one=True
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Mixtral's config with everything that changes the function carried over."""
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
        """Mixtral calls gate, up and down w1, w3 and w2."""
        assert not bias, "Mixtral has no biases; its refusal says so"
        return f"{block_of(moe)}.block_sparse_moe.experts.{expert}.{_MATRIX_NAMES[matrix]}.weight"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """The gate."""
        assert key == "weight_ED", key
        return f"{block_of(moe)}.block_sparse_moe.gate.weight"

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """All three renormalise; llama.cpp's converter knows these names and takes the head from a tie."""
        return ["transformers", "vllm", "llama.cpp"]
