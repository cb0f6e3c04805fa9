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
from recipes.models.export.spec import MixtureSpec, ModelSpec

_MATRIX_NAMES: dict[Matrix, str] = {"gate": "w1", "up": "w3", "down": "w2"}


class MixtralExporter(NativeExporter):
    """Writes `MixtralForCausalLM`."""

    name = "mixtral"
    title = "Mixtral"
    hosts = ("llama", "mistral")
    layouts = ("per_expert",)

    def refusal_of_its_hosts(self, spec: ModelSpec) -> str | None:
        """Mixtral has a softmax router whose weights sum to 1, in every block, and no biases."""
        config = spec.config
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "Mixtral has no biases, and the host has"
        if spec.dense_layers:
            count = len(spec.mixtures)
            return f"Mixtral has no dense layers, and {count} of {spec.num_layers} are mixtures"
        if spec.mixtures[0].shared_width:
            return "Mixtral has no shared expert, and this mixture has"
        return refuse_unlike_llama("Mixtral", spec) or refuse_other_than_softmax(
            "Mixtral", spec, must_sum_to_one=True
        )

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Mixtral's config with everything that changes the function carried over."""
        from transformers import MixtralConfig

        mixture, source = spec.mixtures[0], spec.config
        config = MixtralConfig(
            **carried_values(source),
            intermediate_size=mixture.expert.width,
            num_local_experts=mixture.num_experts,
            num_experts_per_tok=mixture.router.top_k,
            sliding_window=getattr(source, "sliding_window", None),
            router_aux_loss_coef=mixture.router.config.balance_coef,
            router_jitter_noise=0.0,
        )
        config.architectures = ["MixtralForCausalLM"]
        return with_old_rope_keys(config.to_dict())

    def expert_name(self, mixture: MixtureSpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """Mixtral calls gate, up and down w1, w3 and w2."""
        assert not bias, "Mixtral has no biases; its refusal says so"
        return f"{block_of(mixture)}.block_sparse_moe.experts.{expert}.{_MATRIX_NAMES[matrix]}.weight"

    def router_name(self, mixture: MixtureSpec, key: str) -> str:
        """The gate."""
        assert key == "weight_ED", key
        return f"{block_of(mixture)}.block_sparse_moe.gate.weight"

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """All three renormalise; llama.cpp's converter knows these names and takes the head from a tie."""
        return ["transformers", "vllm", "llama.cpp"]
