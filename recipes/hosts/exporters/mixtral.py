"""Llama and Mistral hosts as plain Mixtral: the format that everything reads.

Tensors have the per-expert names of transformers 4, which version 5 reads and writes as well.
Everything that changes the function travels along: Mixtral's defaults are not Llama's (rope_theta is 1e6
there and 1e4 here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.layer import MoELayer
from moe.routers.topk import TopKRouter
from recipes.hosts.exporters.base import Exporter
from recipes.hosts.huggingface import HuggingFaceHost

# What Mixtral's config has under the same name and meaning as Llama's and Mistral's.
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_MOE_NAME = re.compile(r"(model\.layers\.\d+)\.mlp\.(.+)")


class MixtralExporter(Exporter):
    """Writes `MixtralForCausalLM`."""

    name = "mixtral"
    is_native = True

    def refusal(self, host: HuggingFaceHost) -> str | None:
        """Mixtral has a softmax router whose weights sum to 1, in every block, and no biases."""
        config = host.config
        if config.model_type not in ("llama", "mistral"):
            return f"Mixtral holds Llama and Mistral hosts, not {config.model_type}"
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "Mixtral has no biases, and the host has"
        layers = host.moe_layers()
        if len(layers) != config.num_hidden_layers:
            return (
                f"Mixtral has no dense layers, and {len(layers)} of {config.num_hidden_layers} are mixtures"
            )
        for index, layer in layers:
            if reason := _layer_refusal(layer):
                return f"{reason} in layer {index}"
        return None

    def config(self, host: HuggingFaceHost) -> dict[str, Any]:
        """Mixtral's config with everything that changes the function carried over."""
        from transformers import MixtralConfig

        layer = host.moe_layers()[0][1]
        source = host.config
        values = {key: getattr(source, key) for key in _CARRIED if hasattr(source, key)}
        config = MixtralConfig(
            **values,
            intermediate_size=layer.experts.w_down_EDF.shape[2],
            num_local_experts=layer.router.num_experts,
            num_experts_per_tok=layer.router.top_k,
            sliding_window=getattr(source, "sliding_window", None),
            router_aux_loss_coef=layer.router.config.balance_coef,
            router_jitter_noise=0.0,
        )
        config.architectures = ["MixtralForCausalLM"]
        content: dict[str, Any] = config.to_dict()
        # Readers before transformers 5 know rope_theta and rope_scaling, and nothing of rope_parameters.
        rope = content.get("rope_parameters") or {}
        if "rope_theta" in rope:
            content["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
        return content

    def rename(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Router and experts under Mixtral's names, one tensor an expert; the rest as it is."""
        match = _MOE_NAME.fullmatch(name)
        if match is None:
            yield name, tensor
            return
        block, leaf = f"{match[1]}.block_sparse_moe", match[2]
        if leaf == "router.weight_ED":
            yield f"{block}.gate.weight", tensor
        elif leaf == "experts.w_up_EUD":
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                yield f"{block}.experts.{e}.w1.weight", gate
                yield f"{block}.experts.{e}.w3.weight", up
        elif leaf == "experts.w_down_EDF":
            for e, expert in enumerate(tensor):
                yield f"{block}.experts.{e}.w2.weight", expert
        else:
            raise AssertionError(f"no Mixtral name for {name}")

    def load(self, folder: Path) -> Any:
        """By plain `AutoModelForCausalLM`."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def _layer_refusal(layer: MoELayer) -> str | None:
    router = layer.router
    if not isinstance(router, TopKRouter):
        return f"Mixtral has a top-k router, not {router.name!r}"
    if router.config.score != "softmax" or not router.weights_sum_to_one:
        return "Mixtral's gates are a softmax renormalised to sum to 1, and this router's are not"
    if not layer.experts.gated or layer.experts.b_up_EU is not None:
        return "Mixtral's experts are gated and without biases, and these are not"
    return None
