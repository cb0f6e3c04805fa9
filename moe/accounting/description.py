"""Figures of a model in one mapping, and as lines to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe.accounting.bytes import BitWidths, StepBytes, full_step_bytes, kv_bytes_per_token, step_bytes
from moe.accounting.distinct import estimated_distinct, touched_share
from moe.accounting.families.reading import LayerConfig, reject
from moe.accounting.flops import CONVENTIONS, COUNTED, Flops, flops_from_shape, forward_flops_per_token
from moe.accounting.layers import DenseFFNShape, ModelShape, MoEShape
from moe.accounting.memory import ElementBytes, serving_memory, training_memory
from moe.accounting.mixers import Mixer
from moe.accounting.params import ParameterCount, count_from_shape
from moe.accounting.passes import decode_batch
from moe.accounting.quantisation import DTYPE_BITS, bits_from_config, dtype_bits, override_bits
from moe.accounting.shape import shape_from_config
from moe.accounting.tiers import least_seconds, read_tiers, tier_uses

Figures = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """Settings of the figures.

    Attributes:
        seq_len: Tokens of a sequence.
        batch_size: Sequences at once.
        kv_dtype: Dtype of the cache.
        bits: ``class=bits`` of tensors, which override the config.
        tiers: Memories in serving, see `moe.accounting.tiers.read_tiers`; empty for one memory.
    """

    seq_len: int = 4096
    batch_size: int = 1
    kv_dtype: str = "bfloat16"
    bits: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()


def describe_model(config: LayerConfig, request: Request) -> Figures:
    """Computes the figures of a model whose family is in the table.

    Args:
        config: The content of its ``config.json``.
        request: Settings.

    Raises:
        ConfigError: The family, the quantisation or a dtype is not known, or a key is missing.
    """
    shape = shape_from_config(config)
    kv_bits = _kv_bits(request.kv_dtype)
    bits, source = bits_from_config(config)
    bits = override_bits(replace(bits, kv=kv_bits), request.bits)
    flops = {name: flops_from_shape(shape, request.seq_len, name) for name in CONVENTIONS}
    return {
        **_heading(config, request, shape.part),
        "parameters": _parameters(count_from_shape(shape)),
        "kv_bytes_per_token": _whole(kv_bytes_per_token(shape, kv_bits)),
        "flops_per_token": {name: _both(value) for name, value in flops.items()},
        "flops_counted": dict(COUNTED),
        "layers": _layers(shape),
        "weight_bits": {"from": source, **asdict(bits)},
        "training_memory": _training(shape, request),
        "serving_memory": asdict(serving_memory(shape, request.seq_len, request.batch_size, bits)),
        "decode_step": _decode_step(shape, request, bits),
    }


def describe_counted(
    config: LayerConfig, count: ParameterCount, attention: Sequence[Mixer] | None, request: Request
) -> Figures:
    """Computes the figures of a model whose module was counted; None for unknown ones.

    Args:
        config: The content of its ``config.json``.
        count: Count of the module.
        attention: Attention of every layer; None if unknown.
        request: Settings.

    Raises:
        ConfigError: The dtype of the cache is not known.
    """
    kv_bits = _kv_bits(request.kv_dtype)
    flops: Figures = dict.fromkeys(CONVENTIONS)
    cache = None
    if attention is not None:
        cache = _whole(sum(mixer.cache_width for mixer in attention) * kv_bits / 8)
        flops = {
            name: _both(Flops(forward_flops_per_token(count, attention, request.seq_len, name)))
            for name in CONVENTIONS
        }
    sizes = ElementBytes()
    return {
        **_heading(config, request, ""),
        "parameters": _parameters(count),
        "kv_bytes_per_token": cache,
        "flops_per_token": flops,
        "flops_counted": dict(COUNTED),
        "training_memory": {
            "weights": count.total * sizes.weights,
            "gradients": count.total * sizes.gradients,
            "optimizer": count.total * sizes.optimizer,
        },
    }


def _kv_bits(name: str) -> float:
    bits = dtype_bits(name)
    if bits is None:
        reject("--kv-dtype", name, "no accounting knows this dtype", f"Known are {', '.join(DTYPE_BITS)}.")
    return bits


def _heading(config: LayerConfig, request: Request, part: str) -> Figures:
    return {
        "model_type": config.get("model_type"),
        "part": part or "whole model",
        "sequence_length": request.seq_len,
        "batch_size": request.batch_size,
        "kv_dtype": request.kv_dtype,
    }


def _parameters(count: ParameterCount) -> Figures:
    return {
        "total": count.total,
        "active": count.active,
        "active_without_input_embedding": count.active_without_input_embedding,
        "active_without_embeddings": count.active_without_embeddings,
        "per_expert": count.per_expert,
    }


def _both(flops: Flops) -> Figures:
    return {"forward": _whole(flops.forward), "training": _whole(flops.training)}


def _layers(shape: ModelShape) -> list[Figures]:
    """Returns every kind of layer with its count, in order of appearance."""
    return [
        {
            "layers": times,
            "mixer": {"kind": type(layer.attention).__name__, **_fields(layer.attention)},
            "ffn": {"kind": type(layer.ffn).__name__, **_fields(layer.ffn)},
            "norms": layer.num_norms,
        }
        for layer, times in Counter(shape.layers).items()
    ]


def _fields(part: Mixer | DenseFFNShape | MoEShape) -> Figures:
    return {key: vars(value) if isinstance(value, Mixer) else value for key, value in vars(part).items()}


def _training(shape: ModelShape, request: Request) -> Figures:
    return {
        **asdict(training_memory(shape, request.seq_len, request.batch_size)),
        "bytes_an_element": asdict(ElementBytes()),
    }


def _decode_step(shape: ModelShape, request: Request, bits: BitWidths) -> Figures:
    batch = decode_batch(request.batch_size, request.seq_len)
    distinct = estimated_distinct(shape, request.batch_size)
    touched = step_bytes(shape, batch, distinct.per_layer, bits)
    networks = distinct.per_layer[: len(shape.moe)]
    return {
        "distinct_experts_mean": sum(networks) / len(networks) if networks else None,
        "distinct_experts_source": distinct.source if shape.moe else None,
        "parameters_touched": touched_share(shape, distinct.per_layer),
        "bytes": asdict(touched),
        "weights": touched.weights,
        "strict": touched.strict,
        "complete": touched.complete,
        "as_if_dense": full_step_bytes(shape, batch, bits).complete,
        "tiers": _tiers(touched, request),
    }


def _tiers(touched: StepBytes, request: Request) -> Figures | None:
    if not request.tiers:
        return None
    uses = tier_uses(touched, read_tiers(request.tiers))
    at_once, in_turn = least_seconds(uses)
    return {
        "tiers": [asdict(use) for use in uses],
        "least_s_at_once": at_once,
        "least_s_in_turn": in_turn,
        "most_tokens_per_s": request.batch_size / at_once,
    }


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def lines_of(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yields the figures from `describe_model` or `describe_counted` as lines."""
    yield f"{figures['model_type']} ({figures['part']})"
    yield from _layer_lines(figures)
    yield "\nparameters"
    for name, value in figures["parameters"].items():
        yield f"  {name.replace('_', ' '):32}{_count(value)}"
    at = f"{figures['sequence_length']} tokens"
    yield f"\nFLOPs a token, sequences of {at}{'':5}{'forward':>12}{'training':>12}"
    for name, both in figures["flops_per_token"].items():
        shown = [_short(both and both[key]) for key in ("forward", "training")]
        yield f"  {name:38}{shown[0]:>12}{shown[1]:>12}   {figures['flops_counted'][name]}"
    yield from _training_lines(figures)
    cache = figures["kv_bytes_per_token"]
    yield f"\ncache: {'not known' if cache is None else f'{cache:,} bytes a token'}, {figures['kv_dtype']}"
    if "decode_step" in figures:
        yield from _serving_lines(figures)


def _layer_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    for kind in figures.get("layers", ()):
        yield f"  {kind['layers']} x {_words(kind['mixer'])}; {_words(kind['ffn'])}"


def _words(kind: Mapping[str, Any]) -> str:
    """Returns the kind and its non-default settings."""
    name = str(kind["kind"]).removesuffix("Shape")
    plain = (None, False, "none", 0)
    shown = [f"{key} {value}" for key, value in kind.items() if key != "kind" and value not in plain]
    return f"{name}: {', '.join(shown)}"


def _training_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    memory = figures["training_memory"]
    sequences = f"{figures['batch_size']} x {figures['sequence_length']} tokens"
    yield "\nmemory to train one replica: fp32 weights and gradients, AdamW"
    for name in ("weights", "gradients", "optimizer"):
        yield f"  {name:32}{_gib(memory[name])}"
    if "activations" in memory:
        yield f"  {'activations, rough':32}{_gib(memory['activations'])}   {sequences}, nothing recomputed"
        again = _gib(memory["activations_recomputed"])
        yield f"  {'activations, rough':32}{again}   {sequences}, every block recomputed"


def _serving_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    memory, step = figures["serving_memory"], figures["decode_step"]
    sequences = f"{figures['batch_size']} x {figures['sequence_length']} tokens"
    yield "\nmemory to serve"
    yield f"  {'weights':32}{_gib(memory['weights'])}   {figures['weight_bits']['from']}"
    yield f"  {'cache':32}{_gib(memory['cache'])}   {sequences}"
    yield f"\nbytes of a decode step, {sequences}"
    if step["distinct_experts_source"] is not None:
        mean = step["distinct_experts_mean"]
        yield f"  {'distinct experts a layer':32}{mean:12.1f}       {step['distinct_experts_source']}"
    yield f"  {'weights touched':32}{_gib(step['weights'])}   {step['parameters_touched']:.1%} of parameters"
    yield f"  {'complete, with the cache':32}{_gib(step['complete'])}   S-MBU"
    yield f"  {'attention, experts, cache':32}{_gib(step['strict'])}   S-MBU by equation 4 to the letter"
    yield f"  {'as if every expert was read':32}{_gib(step['as_if_dense'])}   MBU"
    if step["tiers"] is not None:
        yield from _tier_lines(step["tiers"])


def _tier_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\nby memory"
    for use in found["tiers"]:
        yield f"  {use['name']:32}{_gib(use['bytes'])}   {1e3 * use['least_s']:.2f} ms at its bandwidth"
    once, turns = 1e3 * found["least_s_at_once"], 1e3 * found["least_s_in_turn"]
    yield f"  at least {once:.2f} ms a step when they work at once, {turns:.2f} ms when in turn:"
    yield f"  at most {found['most_tokens_per_s']:,.1f} tokens/s"


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:>20,}   {_short(value, 'B')}"


def _short(value: float | None, billions: str = "G") -> str:
    if value is None:
        return "not known"
    for size, letter in ((1e12, "T"), (1e9, billions), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {letter}"
    return f"{value:g}"


def _gib(value: float) -> str:
    return f"{value / 2**30:12.3f} GiB"
