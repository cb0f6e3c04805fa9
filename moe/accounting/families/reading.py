"""Common parts of the readers of configs: the table's entry, and the parts that many families have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, Mixer, QKNorm
from moe.errors import ConfigError, GraftError, Mistake

LayerConfig = Mapping[str, Any]
T = TypeVar("T")
FFN = DenseFFNShape | MoEShape
LayerReader = Callable[[LayerConfig, int], tuple[Mixer, FFN]]

DECODER_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
KV_HEADS = "num_key_value_heads"
# Required keys whose values are not counts above 0.
NO_COUNTS = frozenset(
    {"mamba_dt_rank", "moe_layers", "router", "gated", "shapes.w_up_EUD", "shapes.w_down_EDF"}
)
MAY_BE_ZERO = frozenset(
    {
        "index",
        "first_k_dense_replace",
        "attn_layer_offset",
        "expert_layer_offset",
        "shared_expert_intermediate_size",
    }
)


@dataclass(frozen=True)
class Family:
    """Reader of the configs of one ``model_type``.

    Attributes:
        read: The reader, called once all keys are present.
        needs: Keys that the config must give, not null.
        states: Keys that the config must give, null or not, as leaving them out has another meaning.
        part: Key of the mapping that is read, and the name of that part.
        defaults: Defaults of transformers for keys in ``needs``.
    """

    read: Callable[[LayerConfig], ModelShape]
    needs: tuple[str, ...]
    states: tuple[str, ...] = ()
    part: tuple[str, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def decoder_family(
    layer_at: LayerReader,
    needs: tuple[str, ...] = ("intermediate_size",),
    *,
    num_norms: int = 2,
    norm_bias: bool = False,
    tied: bool = False,
    kv_heads_stated: bool = True,
) -> Family:
    """Returns the entry of a family whose keys have the usual names.

    Args:
        layer_at: Reads mixer and feed-forward network of a layer.
        needs: Keys beside `DECODER_KEYS`.
        num_norms: Norms per block; 0 also means none after the last layer.
        norm_bias: True if norms have biases.
        tied: Default for tied embeddings.
        kv_heads_stated: Requires the number of key-value heads, as the default of transformers is not the
            number of heads.
    """

    def read(config: LayerConfig) -> ModelShape:
        layers = tuple(
            LayerShape(*layer_at(config, index), num_norms=num_norms, norm_bias=norm_bias)
            for index in range(config["num_hidden_layers"])
        )
        tied_here = bool(config.get("tie_word_embeddings", tied))
        final = 0 if num_norms == 0 else 1 + norm_bias
        return ModelShape(layers, config["hidden_size"], config["vocab_size"], tied_here, final)

    return Family(read, DECODER_KEYS + needs, (KV_HEADS,) if kv_heads_stated else ())


def reject(path: str, value: object, rule: str, remedy: str) -> NoReturn:
    """Raises the error of one mistake."""
    raise ConfigError.one(path, value, rule, remedy)


def look_up(config: LayerConfig, path: str) -> Any:
    """Returns the value at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def reads_config(read: Callable[[LayerConfig], T]) -> Callable[[LayerConfig], T]:
    """Turns whatever a value of another type raises in a reader of configs into one sentence."""

    @functools.wraps(read)
    def reading(config: LayerConfig) -> T:
        try:
            return read(config)
        except GraftError:
            raise
        except Exception as error:
            rule = f"a value in its config.json is not what this family has ({error})"
            reject("model_type", config.get("model_type"), rule, "Give the config.json that was published.")

    return reading


def check_keys(config: LayerConfig, name: str, needs: Sequence[str], states: Sequence[str] = ()) -> None:
    """Rejects a config that lacks keys or has values that are no counts, with all mistakes at once."""
    remedy = "Give the complete config.json."
    mistakes = []
    for key in needs:
        value = look_up(config, key)
        if value is None:
            mistakes.append(Mistake(key, None, f"the config of {name} needs this key", remedy))
        elif key not in NO_COUNTS and not _counts(value, 0 if key in MAY_BE_ZERO else 1):
            mistakes.append(Mistake(key, value, "it must be a whole number above 0", "Correct it."))
    for key in (*states, KV_HEADS, "head_dim"):
        value = config.get(key)
        if key in states and key not in config:
            mistakes.append(Mistake(key, None, f"the config of {name} needs this key", remedy))
        elif value is not None and not _counts(value, 0):
            mistakes.append(Mistake(key, value, "it must be a whole number or null", "Correct it."))
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))


def _counts(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def grouped_attention(
    config: LayerConfig,
    *,
    window: int | None = None,
    head_dim: int | None = None,
    bias: bool = False,
    output_bias: bool = False,
    qk_norm: QKNorm = "none",
) -> AttentionShape:
    """Reads attention under the usual keys.

    Args:
        config: Config of the model.
        window: Sliding window.
        head_dim: The family's default; if None it follows from the hidden size.
        bias: True if the query, key and value projections have biases.
        output_bias: True if the output projection has one.
        qk_norm: See `AttentionShape`.
    """
    heads = config["num_attention_heads"]
    kv_heads = config.get(KV_HEADS)
    width = config.get("head_dim")
    if width is None:
        width = config["hidden_size"] // heads if head_dim is None else head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    return AttentionShape(heads, kv_heads, width, window, bias, output_bias, qk_norm)


def listed_window(config: LayerConfig, index: int, otherwise: bool) -> int | None:
    """Returns a layer's window by ``layer_types``; without that list, ``otherwise`` tells if it slides."""
    kinds: Sequence[str] | None = config.get("layer_types")
    slides = otherwise
    if kinds is not None:
        kind = kind_of_layer(kinds, index, ("full_attention", "sliding_attention"))
        slides = kind == "sliding_attention"
    if not slides:
        return None
    window = config.get("sliding_window")
    if not window:
        reject("sliding_window", window, f"layer {index} slides and needs a window", "Give its positions.")
    return int(window)


def kind_of_layer(kinds: Sequence[str], index: int, known: Sequence[str]) -> str:
    """Returns the entry of ``layer_types`` for a layer, if it is a known one."""
    if index >= len(kinds):
        reject("layer_types", list(kinds), f"it does not give the kind of layer {index}", "Correct it.")
    if kinds[index] not in known:
        reject(f"layer_types[{index}]", kinds[index], "no accounting knows this attention", "Correct it.")
    return kinds[index]


def attention_bias(config: LayerConfig, otherwise: bool = False) -> bool:
    """Returns the key ``attention_bias``."""
    return bool(config.get("attention_bias", otherwise))
