"""What a decoder is made of, layer by layer, as far as its cost depends on it.

`shape_from_config` reads it from the mapping in a Hugging Face ``config.json``. It knows the families in
`FAMILIES` and refuses every other: a guessed shape gives a wrong count without a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from moe.errors import ConfigError, Mistake

QKNorm = Literal["none", "head", "full"]
LayerConfig = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionShape:
    """Multi-head or grouped-query attention.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        sliding_window: Positions that a query sees, itself included; None for all before it.
        bias: The query, key and value projections have biases.
        output_bias: The output projection has one.
        qk_norm: Scale of the norm on queries and keys: none, one value per channel of a ``head``, or
            one per channel of all heads (``full``).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = "none"

    def matrix_parameters(self, hidden_size: int) -> int:
        """Elements of the four projections."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def vector_parameters(self, hidden_size: int) -> int:
        """Elements of biases and query-key norms."""
        channels = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        norm = {"none": 0, "head": 2, "full": self.num_heads + self.num_kv_heads}[self.qk_norm]
        return self.bias * channels + self.output_bias * hidden_size + norm * self.head_dim


@dataclass(frozen=True)
class DenseFFNShape:
    """A feed-forward network: up and down, and a gate beside up when ``gated``."""

    width: int
    gated: bool = True
    bias: bool = False

    def matrix_parameters(self, hidden_size: int) -> int:
        """Elements of the projections."""
        return (3 if self.gated else 2) * hidden_size * self.width

    def vector_parameters(self, hidden_size: int) -> int:
        """Elements of the biases."""
        return self.bias * ((2 if self.gated else 1) * self.width + hidden_size)


@dataclass(frozen=True)
class MoEShape:
    """A mixture of experts.

    Attributes:
        num_experts: Routed experts.
        top_k: Routed experts that a token uses.
        width: Inner width of a routed expert.
        gated: Each expert has a gate beside its up projection.
        bias: Each expert has biases.
        shared_width: Inner width of the shared expert that every token uses; 0 for none.
        shared_gate: The shared expert's output is scaled by a learned gate, one row of the hidden size.
    """

    num_experts: int
    top_k: int
    width: int
    gated: bool = True
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False

    @property
    def expert(self) -> DenseFFNShape:
        """One routed expert."""
        return DenseFFNShape(self.width, self.gated, self.bias)

    def always_matrix_parameters(self, hidden_size: int) -> int:
        """Elements of what every token uses: router, shared expert and its gate."""
        shared = DenseFFNShape(self.shared_width, self.gated).matrix_parameters(hidden_size)
        return (self.num_experts + self.shared_gate) * hidden_size + shared


@dataclass(frozen=True)
class LayerShape:
    """One block: attention, feed-forward network, and its norms over the hidden size."""

    attention: AttentionShape
    ffn: DenseFFNShape | MoEShape
    num_norms: int = 2


@dataclass(frozen=True)
class ModelShape:
    """A decoder. It has one norm after the last layer and a language-model head without bias."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool

    @property
    def attention(self) -> tuple[AttentionShape, ...]:
        """The attention of every layer, in order."""
        return tuple(layer.attention for layer in self.layers)


def shape_from_config(config: LayerConfig) -> ModelShape:
    """Reads a model's shape from the mapping in a Hugging Face ``config.json``.

    Args:
        config: For instance ``json.loads(path.read_text())`` or ``model.config.to_dict()``.

    Raises:
        ConfigError: The family is unknown, a key is missing, or the attention is not causal.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        _refuse(
            "model_type",
            family,
            "no accounting knows this family",
            f"Known are {known}. For another, count a live module with moe.accounting.params.",
        )
    if config.get("use_bidirectional_attention"):
        _refuse("use_bidirectional_attention", True, "attention must be causal", "Count a causal decoder.")
    layer_at, num_norms, tied = FAMILIES[family]
    _check_keys(config, family)
    layers = []
    for index in range(config["num_hidden_layers"]):
        attention, ffn = layer_at(config, index)
        layers.append(LayerShape(attention, ffn, num_norms))
    tied = config.get("tie_word_embeddings", tied)
    return ModelShape(tuple(layers), config["hidden_size"], config["vocab_size"], tied)


def attention_from_config(config: LayerConfig) -> tuple[AttentionShape, ...]:
    """Reads the attention of every layer; of families outside `FAMILIES` too, where it is plain.

    Together with `moe.accounting.params.count_parameters` of a live module this gives the FLOPs of a model
    whose family is not in the table. All layers are then taken to be alike, without biases.

    Raises:
        ConfigError: A key is missing, or the config names another kind of attention (latent, linear,
            state-space, or a window that only some layers have).
    """
    if config.get("model_type") in FAMILIES:
        return shape_from_config(config).attention
    for key in ("kv_lora_rank", "linear_num_key_heads", "mamba_d_state", "ssm_cfg", "attn_layer_period"):
        if config.get(key) is not None:
            _refuse(key, config[key], "no accounting knows this attention", "Add the family to shape.py.")
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        _refuse(
            "layer_types", sorted(kinds), "only full attention is known here", "Add the family to shape.py."
        )
    _check_keys(config, "this")
    one = _attention(config, window=config.get("sliding_window"))
    return (one,) * int(config["num_hidden_layers"])


def _refuse(path: str, value: object, rule: str, remedy: str) -> NoReturn:
    raise ConfigError.one(path, value, rule, remedy)


COMMON_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
FAMILY_KEYS: Mapping[str, tuple[str, ...]] = {
    "mixtral": ("intermediate_size", "num_local_experts", "num_experts_per_tok"),
    "qwen2_moe": (
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    "qwen3_moe": ("intermediate_size", "num_experts_per_tok", "moe_intermediate_size"),
    "olmoe": ("intermediate_size", "num_experts", "num_experts_per_tok"),
    "this": (),
}


def _check_keys(config: LayerConfig, family: str) -> None:
    needed = COMMON_KEYS + FAMILY_KEYS.get(family, ("intermediate_size",))
    missing = [
        Mistake(key, None, f"the config of {family} needs this key", "Give the complete config.json.")
        for key in needed
        if config.get(key) is None
    ]
    if missing:
        raise ConfigError(missing)


def _attention(
    config: LayerConfig,
    *,
    window: int | None = None,
    head_dim: int | None = None,
    bias: bool = False,
    output_bias: bool = False,
    qk_norm: QKNorm = "none",
) -> AttentionShape:
    """``head_dim`` is the family's default; without one it follows from the hidden size."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads")
    width = config.get("head_dim")
    if width is None:
        width = config["hidden_size"] // heads if head_dim is None else head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    return AttentionShape(heads, kv_heads, width, window, bias, output_bias, qk_norm)


def _listed_window(config: LayerConfig, index: int, otherwise: bool) -> int | None:
    """The window of a layer as ``layer_types`` says; without that list ``otherwise`` says if it slides."""
    kinds: Sequence[str] | None = config.get("layer_types")
    if kinds is None:
        slides = otherwise
    elif kinds[index] in ("full_attention", "sliding_attention"):
        slides = kinds[index] == "sliding_attention"
    else:
        _refuse(f"layer_types[{index}]", kinds[index], "no accounting knows this attention", "Correct it.")
    if not slides:
        return None
    window = config.get("sliding_window")
    if not window:
        _refuse("sliding_window", window, f"layer {index} slides and needs a window", "Give its positions.")
    return int(window)


def _sparse(config: LayerConfig, index: int) -> bool:
    """Whether a Qwen MoE layer has experts: every n-th has, but for those listed as dense."""
    step = config.get("decoder_sparse_step", 1)
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % step == 0


def _llama(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    ffn = DenseFFNShape(config["intermediate_size"], bias=bool(config.get("mlp_bias", False)))
    return _attention(config, bias=bias, output_bias=bias), ffn


def _mistral(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    return _attention(config, window=config.get("sliding_window")), DenseFFNShape(config["intermediate_size"])


def _mixtral(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    experts = MoEShape(
        config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    )
    return _attention(config, window=config.get("sliding_window")), experts


def _qwen2(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    attention = _attention(config, window=_qwen_window(config, index), bias=True)
    return attention, DenseFFNShape(config["intermediate_size"])


def _qwen3(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    window = _qwen_window(config, index)
    attention = _attention(config, window=window, head_dim=128, bias=bias, output_bias=bias, qk_norm="head")
    return attention, DenseFFNShape(config["intermediate_size"])


def _qwen_window(config: LayerConfig, index: int) -> int | None:
    """Layers slide only when ``use_sliding_window``, and then from ``max_window_layers`` on."""
    if not config.get("use_sliding_window", False):
        return None
    return _listed_window(config, index, index >= config.get("max_window_layers", 28))


def _qwen2_moe(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        _refuse("layer_types", None, "which layers slide is not said", "List the kind of every layer.")
    window = _qwen_window(config, index)
    attention = _attention(config, window=window, bias=bool(config.get("qkv_bias", True)))
    if not _sparse(config, index):
        return attention, DenseFFNShape(config["intermediate_size"])
    experts = MoEShape(
        config["num_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        shared_width=config["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    return attention, experts


def _qwen3_moe(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    attention = _attention(config, window=window, bias=bias, output_bias=bias, qk_norm="head")
    if not _sparse(config, index):
        return attention, DenseFFNShape(config["intermediate_size"])
    names = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    counts = {int(config[key]) for key in names}
    if len(counts) != 1:
        _refuse("num_experts", sorted(counts), "the number of experts must be given once", "Correct it.")
    experts = MoEShape(counts.pop(), config["num_experts_per_tok"], config["moe_intermediate_size"])
    return attention, experts


def _olmo2(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    attention = _attention(config, bias=bias, output_bias=bias, qk_norm="full")
    return attention, DenseFFNShape(config["intermediate_size"])


def _olmoe(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    attention, _ = _olmo2(config, index)
    experts = MoEShape(config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"])
    return attention, experts


def _gemma(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    attention = _attention(config, head_dim=256, bias=bias, output_bias=bias)
    return attention, DenseFFNShape(config["intermediate_size"])


def _gemma2(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    window = _listed_window(config, index, otherwise=index % 2 == 0)
    attention = _attention(config, window=window, head_dim=256, bias=bias, output_bias=bias)
    return attention, DenseFFNShape(config["intermediate_size"])


def _gemma3(config: LayerConfig, index: int) -> tuple[AttentionShape, DenseFFNShape | MoEShape]:
    bias = bool(config.get("attention_bias", False))
    slides = (index + 1) % config.get("sliding_window_pattern", 6) != 0
    window = _listed_window(config, index, slides)
    attention = _attention(config, window=window, head_dim=256, bias=bias, output_bias=bias, qk_norm="head")
    return attention, DenseFFNShape(config["intermediate_size"])


LayerReader = Callable[[LayerConfig, int], tuple[AttentionShape, DenseFFNShape | MoEShape]]

# model_type to: how a layer is read, norms a block, whether embeddings are tied if the config is silent.
FAMILIES: Mapping[str, tuple[LayerReader, int, bool]] = {
    "llama": (_llama, 2, False),
    "mistral": (_mistral, 2, False),
    "mixtral": (_mixtral, 2, False),
    "qwen2": (_qwen2, 2, False),
    "qwen3": (_qwen3, 2, False),
    "qwen2_moe": (_qwen2_moe, 2, False),
    "qwen3_moe": (_qwen3_moe, 2, False),
    "olmo2": (_olmo2, 2, False),
    "olmoe": (_olmoe, 2, False),
    "gemma": (_gemma, 2, True),
    "gemma2": (_gemma2, 4, True),
    "gemma3_text": (_gemma3, 4, True),
}
