"""Checks of a checkpoint folder that need neither weights nor heavy imports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.errors import Mistake, ModelError
from moe.registry import declared_names
from recipes.models.hf.config_file import brings_code, code_keys, read_config
from recipes.models.hf.weight_files import check_weights

#: Config keys for the number of routed experts in the families of transformers.
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer")
# More than any model has; a list of so many layers or an embedding of so many rows is never made.
_MOST = {"num_hidden_layers": 10**4, "n_layer": 10**4}
_LARGEST = 10**8
_TRUST = "trust_remote_code=true"
_QUANTISED = "quantization_config"


def check_dense(path: str, *, trust_remote_code: bool = False) -> list[Mistake]:
    """Finds all reasons why a folder cannot be the dense checkpoint.

    Reads ``config.json`` and the headers of the weight files, never the weights.
    """
    config, mistakes = _read(path)
    if config is None:
        return mistakes
    mistakes = _check_config(path, config, trust_remote_code) + _check_dense_config(path, config)
    return mistakes + _check_weights(path, config)


def check_checkpoint(path: str, option: str, *, trust_remote_code: bool = False) -> list[Mistake]:
    """Finds all reasons why a folder is no checkpoint, dense or MoE.

    Args:
        path: The folder.
        option: The config path or flag named in mistakes.
        trust_remote_code: Whether the folder may contain code.
    """
    config, mistakes = _read(path)
    if config is not None:
        mistakes = _check_config(path, config, trust_remote_code)
        mistakes += _check_weights(path, config)
    flag = "--trust-remote-code" if option.startswith("--") else _TRUST
    return [
        replace(mistake, path=option, remedy=mistake.remedy.replace(_TRUST, flag)) for mistake in mistakes
    ]


def _check_weights(path: str, config: dict[str, Any]) -> list[Mistake]:
    # Files of quantised weights say no more than their config.
    return [] if config.get(_QUANTISED) else check_weights(path, Path(path).expanduser())


def _read(path: str) -> tuple[dict[str, Any] | None, list[Mistake]]:
    folder = Path(path).expanduser()
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        return None, [_mistake(path, f"it is no path ({error})", "Give the path of a local folder.")]
    if not exists:
        rule, remedy = "the folder does not exist", "Give the path of a local checkpoint folder."
        return None, [_mistake(path, rule, remedy)]
    if not is_folder:
        rule, remedy = "this is a file, not a folder", "Give the folder that holds config.json."
        return None, [_mistake(path, rule, remedy)]
    try:
        return read_config(folder), []
    except ModelError as error:
        return None, [replace(mistake, value=path) for mistake in error.mistakes]


def _mistake(path: str, rule: str, remedy: str) -> Mistake:
    return Mistake("dense", path, rule, remedy)


def _check_config(path: str, config: dict[str, Any], trust_remote_code: bool) -> list[Mistake]:
    mistakes = list(_check_types(path, config))
    if mistakes:
        return mistakes
    family = config["model_type"]
    architectures = config.get("architectures") or []
    decoder = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    if config.get("is_encoder_decoder") or (architectures and not decoder):
        what = ", ".join(map(str, architectures)) or family
        mistakes.append(
            _mistake(
                path,
                f"this is not a decoder-only language model but {what}",
                "Give a causal language model (architectures: ...ForCausalLM), such as Llama or Qwen.",
            )
        )
    if not trust_remote_code:
        mistakes += _check_code(path, config)
    if quantised := config.get(_QUANTISED):
        rule = "its config.json has a quantization_config"
        remedy = "Give the checkpoint that it was quantised from; if its weights are plain, delete the key."
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        if method in declared_names("recipes.models.packed", "*_format.py"):
            rule = f"its weights are quantised ({method})"
            remedy = f"Write them plain: graft dequantize {path} --out DIR, then give DIR."
        mistakes.append(_mistake(path, rule, remedy))
    return mistakes


def _check_types(path: str, config: dict[str, Any]) -> Iterator[Mistake]:
    """Checks the fields that are read before transformers has seen the config."""
    correct = "Correct it: give the config.json that the model was published with."
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        yield _mistake(path, "its config.json names no model_type", "Give a transformers checkpoint.")
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        yield _mistake(path, f"its config.json has text_config={text!r}, which is no object", correct)
        text = None
    if not isinstance(config.get("architectures") or [], list):
        shown = config["architectures"]
        yield _mistake(path, f"its config.json has architectures={shown!r}, which is no list", correct)
    sizes = config | (text or {})
    for key in _COUNTS:
        value = sizes.get(key)
        if isinstance(value, bool | str | float | dict):
            yield _mistake(path, f"its config.json has {key}={value!r}, which is no whole number", correct)
        elif isinstance(value, int) and not 0 < value <= _MOST.get(key, _LARGEST):
            yield _mistake(path, f"its config.json has {key}={_short(value)}, which no model has", correct)
    pad, rows = sizes.get("pad_token_id"), sizes.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        rule = f"its config.json has pad_token_id={_short(pad)}, beyond vocab_size={_short(rows)}"
        remedy = "Set pad_token_id to a token of the vocabulary, such as eos_token_id, or to null."
        yield _mistake(path, rule, remedy)


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**12 else f"{'-' if number < 0 else ''}10^12 or more"


def _check_code(path: str, config: dict[str, Any]) -> list[Mistake]:
    """Checks that nothing would be fetched or run that the user has not trusted."""
    trust = f"If you have read and trust that code, set {_TRUST}."
    mistakes = []
    if keys := code_keys(config):
        rule = f"its config.json asks for code of a hub ({keys[0]})"
        mistakes.append(_mistake(path, rule, f"Delete the key. {trust}"))
    if brings_code(config):
        mistakes.append(
            _mistake(
                path,
                "it brings its own code (auto_map in config.json)",
                trust,
            )
        )
    return mistakes


def _check_dense_config(path: str, config: dict[str, Any]) -> list[Mistake]:
    experts = [key for key in EXPERT_COUNT_KEYS if isinstance(config.get(key), int) and config[key] > 1]
    if not experts:
        return []
    rule = f"this model is an MoE already ({experts[0]}={config[experts[0]]})"
    return [_mistake(path, rule, "Give a dense checkpoint, or train this one on by +recipe=continue.")]
