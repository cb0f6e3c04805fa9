"""Bits per element by a config's ``quantization_config``, which overrides its ``dtype``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe.accounting.bytes import CLASSES, BitWidths, uniform_bits
from moe.accounting.families.reading import LayerConfig, reads_config, reject
from moe.errors import ConfigError, Mistake

DTYPE_BITS: Mapping[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8": 8,
    "int8": 8,
    "int4": 4,
}
SHORT_NAMES: Mapping[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "float8",
}
# Classes that quantisation applies to by default, as in its makers' code.
_LINEAR = ("attention", "dense", "shared", "expert")


def dtype_bits(name: str) -> float | None:
    """Returns the bits of a dtype by its name, with or without ``torch.``; None if unknown."""
    plain = name.removeprefix("torch.")
    return DTYPE_BITS.get(SHORT_NAMES.get(plain, plain))


@reads_config
def bits_from_config(config: LayerConfig) -> tuple[BitWidths, str]:
    """Returns the bits by class of tensor, and their origin in words.

    Args:
        config: The content of a ``config.json``.

    Raises:
        ConfigError: The dtype or the method of quantisation is unknown, or it differs between layers.
    """
    inner = config.get("text_config") or config.get("dense_config") or {}
    named = _first(
        config.get("dtype"), config.get("torch_dtype"), inner.get("dtype"), inner.get("torch_dtype")
    )
    base = 16.0 if named is None else dtype_bits(str(named))
    if base is None:
        reject("dtype", named, "no accounting knows this dtype", f"Known are {', '.join(DTYPE_BITS)}.")
    bits = uniform_bits(base)
    words = "bfloat16, assumed: the config names no dtype" if named is None else str(named)
    quantised: Any = _first(config.get("quantization_config"), inner.get("quantization_config"))
    if not quantised:
        return bits, words
    if not isinstance(quantised, Mapping):
        reject(
            "quantization_config", quantised, "it is no object", "Give the config.json that was published."
        )
    method = quantised.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        rule = "no accounting knows this method of quantisation"
        reject("quantization_config.quant_method", method, rule, f"Known are {known}. Give bits by class.")
    low, classes = METHODS[method](quantised)
    spared = {_class_of(name) for name in quantised.get("modules_to_not_convert") or ()}
    taken = [name for name in classes if name not in spared]
    bits = replace(bits, **dict.fromkeys(taken, low))
    if "expert" in taken:
        bits = replace(bits, expert_vector=base)
    return bits, f"{method}: {low:g} bits with scales for {', '.join(taken) or 'nothing'}; the rest {words}"


def override_bits(bits: BitWidths, changes: Sequence[str]) -> BitWidths:
    """Changes the bits of some classes, each given as ``class=bits``.

    Raises:
        ConfigError: Some are not of this form; carries all of them.
    """
    mistakes, values = [], {}
    for change in changes:
        name, _, number = change.partition("=")
        if name not in CLASSES or not re.fullmatch(r"\d+(\.\d+)?", number):
            rule = "it must be CLASS=BITS with a known class"
            mistakes.append(Mistake("--bits", change, rule, f"Classes are {', '.join(CLASSES)}."))
        else:
            values[name] = float(number)
    if mistakes:
        raise ConfigError(mistakes)
    return replace(bits, **values)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _mxfp4(quantised: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Returns the bits of MXFP4: blocks of 32 4-bit values with an 8-bit scale; routed experts only."""
    return 4 + 8 / 32, ("expert",)


def _fp8(quantised: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Returns 8 bits plus a 32-bit scale per block; without blocks, scales are negligible."""
    block = quantised.get("weight_block_size")
    return 8 + (32 / (block[0] * block[1]) if block else 0.0), _LINEAR


def _grouped(quantised: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Returns the bits of GPTQ and AWQ: each group has a 16-bit scale and a zero point as wide as a value."""
    bits = _first(quantised.get("bits"), quantised.get("w_bit"))
    group = _first(quantised.get("group_size"), quantised.get("q_group_size"))
    if not isinstance(bits, int) or not isinstance(group, int):
        reject("quantization_config", dict(quantised), "it lacks bits or group_size", "Give both.")
    return bits + ((16 + bits) / group if group > 0 else 0.0), _LINEAR


METHODS: Mapping[str, Callable[[Mapping[str, Any]], tuple[float, tuple[str, ...]]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "gptq": _grouped,
    "awq": _grouped,
}


def _class_of(name: str) -> str:
    """Returns the class of tensors that an entry of ``modules_to_not_convert`` exempts.

    Entries that name one layer exempt that layer alone, which classes cannot express: they are rejected for
    classes that are quantised in other layers.
    """
    found = next((found for pattern, found in _PATTERNS.items() if re.search(pattern, name)), "")
    single = re.search(r"\.\d+\.", name) is not None and found in _LINEAR
    if not found or single:
        rule = "the tensors that it exempts form no class"
        reject("quantization_config.modules_to_not_convert", name, rule, "Give bits by class.")
    return found


_PATTERNS = {
    r"norm": "vector",
    r"lm_head": "head",
    r"embed": "embedding",
    r"router|gate$|shared_expert_gate": "router",
    r"shared_expert": "shared",
    r"experts": "expert",
    r"attn|attention": "attention",
    r"mlp$": "dense",
}
