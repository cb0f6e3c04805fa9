"""Native formats: MoE classes of transformers that hold Llama-like models with gated experts."""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe.upcycle.dense_shape import Matrix
from recipes.models.export.base import Exporter, Layout
from recipes.models.export.read_back import NativeUnread, Unread
from recipes.models.export.spec import ModelSpec, MoESpec

#: Config keys with the same name and meaning in the Llama-like families and their MoE classes.
COMMON_KEYS = (
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
# Rotary embeddings that tests certify in other programs.
_CERTIFIED_ROPE = ("default", "llama3", "yarn")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp")


class NativeExporter(Exporter):
    """Base of the native formats; experts are named ``mlp.experts.E.{gate,up,down}_proj``.

    Attributes:
        family: Prefix of transformers' config and model classes.
        config_keys: Keys of the dense config that are carried over.
        router_keys: Key in the router's state -> name on disk below ``mlp.gate``.
        shared_module: Name of the shared expert below ``mlp``; empty if the class has none.
        has_dense_layers: Whether the class can have dense layers.
        must_sum_to_one: Whether the class renormalises the gates of the chosen experts.
    """

    is_native = True
    layouts: ClassVar[tuple[Layout, ...]] = ("per_expert", "fused")
    family: ClassVar[str]
    config_keys: ClassVar[tuple[str, ...]] = COMMON_KEYS
    router_keys: ClassVar[dict[str, str]] = {"weight_ED": "weight"}
    shared_module: ClassVar[str] = ""
    has_dense_layers: ClassVar[bool] = True
    must_sum_to_one: ClassVar[bool] = False

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """See `Exporter`; the class needs like experts in like layers, under the one router that it has."""
        if reason := self.model_reason(spec):
            return reason
        if spec.dense_layers and not self.has_dense_layers:
            count = len(spec.moe_blocks)
            return f"{self.title} has no dense layers, and {count} of {spec.num_layers} are MoE layers"
        if spec.moe_blocks[0].shared_width and not self.shared_module:
            return f"{self.title} has no shared expert, and this model has"
        return self._experts_reason(spec) or self.router_reason(spec)

    def model_reason(self, spec: ModelSpec) -> str | None:
        """Returns why the class cannot hold the model outside its MoE layers; None if it can."""
        return None

    def router_reason(self, spec: ModelSpec) -> str | None:
        """Returns why the router is no top-k of a softmax, over all or the chosen experts; None if it is."""
        router = spec.moe_blocks[0].router
        if router.name != "topk":
            return f"{self.title} has a top-k router, not {router.name!r}"
        if router.config.score != "softmax":
            return f"{self.title}'s gates are a softmax, and this router's are a {router.config.score}"
        if self.must_sum_to_one and not router.weights_sum_to_one:
            return f"{self.title}'s gates are a softmax renormalised to sum to 1, and this router's are not"
        return None

    def _experts_reason(self, spec: ModelSpec) -> str | None:
        """Returns why experts are not gated, unbiased, alike and placed as in Llama; None if they are."""
        first = spec.moe_blocks[0]
        for moe in spec.moe_blocks:
            if _BLOCK.fullmatch(moe.site) is None:
                return f"{self.title} has its experts in model.layers.N.mlp, and this model in {moe.site}"
            if not moe.expert.gated or moe.expert.up_bias or moe.expert.down_bias:
                where = f"these are not in layer {moe.index}"
                return f"{self.title}'s experts are gated and without biases, and {where}"
            if _kind(moe) != _kind(first):
                where = f"layer {moe.index} differs"
                return f"{self.title} has one router and one size of experts, and {where}"
        return None

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the class's config: values of the dense model, then those of the MoE layers."""
        import transformers

        source, moe = spec.read, spec.moe_blocks[0]
        values = {key: getattr(source, key) for key in self.config_keys if hasattr(source, key)}
        values |= {"num_experts_per_tok": moe.router.top_k} | self.config_values(spec)
        config = getattr(transformers, f"{self.family}Config")(**values)
        config.architectures = [f"{self.family}ForCausalLM"]
        return with_old_rope_keys(config.to_dict())

    def exact_in(self, spec: ModelSpec, layout: Layout = "per_expert") -> list[str]:
        """Lists transformers, and in the layout that tests certify the programs that are not `differing`."""
        if layout != "per_expert":
            return ["transformers"]
        differing = self.differing(spec)
        return ["transformers", *(name for name in ("vllm", "llama.cpp") if name not in differing)]

    def differing(self, spec: ModelSpec) -> dict[str, str]:
        """Returns the programs that compute something else, or may, with the reason as a clause.

        ``tests/recipes/cap/certify/test_programs.py`` certifies the others, and that these differ.
        """
        rope = (getattr(spec.read, "rope_parameters", None) or {}).get("rope_type", "default")
        reason = None
        if spec.read.hidden_act != "silu":
            reason = f"its experts have SiLU, and these {spec.read.hidden_act}"
        elif rope not in _CERTIFIED_ROPE:
            reason = f"no test certifies rotary embeddings of type {rope} there"
        found = dict.fromkeys(("vllm", "llama.cpp"), reason) if reason else {}
        return self.class_differing(spec) | found

    @abstractmethod
    def class_differing(self, spec: ModelSpec) -> dict[str, str]:
        """Does the same for what only this class has."""

    @abstractmethod
    def config_values(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the values of the config that are not carried over from the dense model."""

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.expert_name`; each matrix of each expert has a tensor of its own."""
        assert not bias, f"{self.name} has no biases; its unsupported_reason says so"
        return f"{moe.site}.experts.{expert}.{matrix}_proj.weight"

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """See `Exporter.fused_name`; in transformers 5 they are parameters, without ``.weight``."""
        return f"{moe.site}.experts.{'gate_up_proj' if matrix == 'up' else 'down_proj'}"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """See `Exporter.router_name`."""
        return f"{moe.site}.gate.{self.router_keys[key]}"

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.shared_name`; it is a plain feed-forward network."""
        assert self.shared_module and not bias, f"{self.name}: its unsupported_reason says so"
        return f"{moe.site}.{self.shared_module}.{matrix}_proj.weight"

    def open(self, folder: Path, *, trust_remote_code: bool = False) -> Unread:
        """See `Exporter.open`; uses transformers' own loader."""
        return NativeUnread(folder, trust_remote_code=trust_remote_code)


def aux_loss_coef(spec: ModelSpec) -> float:
    """Returns the coefficient at which transformers' balance loss has the gradients of ours.

    Both are ``E sum f P``. In transformers f counts choices per token, which sum to K and not to 1, and f and
    P are means over the L layers, not those of one layer: a layer's gradient is K / L of that of ours.
    """
    moe = spec.moe_blocks[0]
    return float(moe.router.config.balance_coef) * len(spec.moe_blocks) / moe.router.top_k


def _kind(moe: MoESpec) -> tuple[object, ...]:
    return (moe.router.config, moe.num_experts, moe.expert, moe.shared_width)


def with_old_rope_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Adds rope_theta and rope_scaling, since readers before transformers 5 ignore rope_parameters."""
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        content["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    return content
