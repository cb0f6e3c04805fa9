"""Checks of a checkpoint folder that need neither weights nor heavy imports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe.errors import Mistake

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Config keys for the number of routed experts in the families of transformers.
_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the folder's ``config.json``; call `check_dense` first."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that hold the weights.

    Raises:
        ValueError: The index cannot be read, or names a file outside the folder.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{INDEX_NAME} cannot be read ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{INDEX_NAME} names {name!r}, which is not a plain file name")
    return [folder / name for name in names]


def check_dense(path: str, *, trust_remote_code: bool = False) -> list[Mistake]:
    """Finds all reasons why a folder cannot be the dense checkpoint.

    Reads ``config.json`` and the headers of the weight files, never the weights.
    """
    config, mistakes = _read(path)
    if config is None:
        return mistakes
    mistakes = _check_config(path, config, trust_remote_code) + _check_dense_config(path, config)
    return mistakes + _check_weights(path, Path(path).expanduser())


def check_checkpoint(path: str, option: str) -> list[Mistake]:
    """Finds all reasons why a folder is no checkpoint, dense or MoE.

    Args:
        path: The folder.
        option: The config path or flag named in mistakes.
    """
    config, mistakes = _read(path)
    if config is not None:
        mistakes = _check_config(path, config, trust_remote_code=False)
        mistakes += _check_weights(path, Path(path).expanduser())
    return [replace(mistake, path=option) for mistake in mistakes]


def _read(path: str) -> tuple[dict[str, Any] | None, list[Mistake]]:
    folder = Path(path).expanduser()
    if not folder.exists():
        rule, remedy = "the folder does not exist", "Give the path of a local checkpoint folder."
        return None, [_mistake(path, rule, remedy)]
    if not folder.is_dir():
        rule, remedy = "this is a file, not a folder", "Give the folder that holds config.json."
        return None, [_mistake(path, rule, remedy)]
    try:
        config = read_config(folder)
    except FileNotFoundError:
        rule, remedy = "there is no config.json in it", "Give a checkpoint in Hugging Face format."
        return None, [_mistake(path, rule, remedy)]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        rule = f"its config.json is not valid JSON ({error})"
        return None, [_mistake(path, rule, "Download it again.")]
    except OSError as error:
        rule = f"its config.json cannot be read ({error.strerror})"
        return None, [_mistake(path, rule, "Check permissions.")]
    if not isinstance(config, dict):
        return None, [_mistake(path, "its config.json is not a JSON object", "Download it again.")]
    return config, []


def _mistake(path: str, rule: str, remedy: str) -> Mistake:
    return Mistake("dense", path, rule, remedy)


def _check_config(path: str, config: dict[str, Any], trust_remote_code: bool) -> list[Mistake]:
    family = config.get("model_type")
    if not family:
        return [_mistake(path, "its config.json names no model_type", "Give a transformers checkpoint.")]
    mistakes = []
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
    if "auto_map" in config and not trust_remote_code:
        mistakes.append(
            _mistake(
                path,
                "it brings its own code (auto_map in config.json)",
                "If you have read and trust that code, set trust_remote_code=true.",
            )
        )
    return mistakes


def _check_dense_config(path: str, config: dict[str, Any]) -> list[Mistake]:
    experts = [key for key in _EXPERT_COUNT_KEYS if isinstance(config.get(key), int) and config[key] > 1]
    if not experts:
        return []
    rule = f"this model is an MoE already ({experts[0]}={config[experts[0]]})"
    return [_mistake(path, rule, "Give a dense checkpoint.")]


def _check_weights(path: str, folder: Path) -> list[Mistake]:
    try:
        files = weight_files(folder)
    except ValueError as error:
        return [_mistake(path, str(error), "Download the checkpoint again.")]
    if not files:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        found = f"there are {', '.join(other[:3])}, which are pickles" if other else "it holds no weights"
        return [_mistake(path, f"no *.safetensors file: {found}", "Save it with safe_serialization=True.")]
    mistakes = []
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except FileNotFoundError:
            mistakes.append(_mistake(path, f"{file.name}, named in {INDEX_NAME}, is missing", "Download it."))
        except (SafetensorError, OSError) as error:
            rule = f"{file.name} is corrupt or cut short ({error})"
            mistakes.append(_mistake(path, rule, "Download that file again."))
    return mistakes
