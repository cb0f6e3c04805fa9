"""A folder as a system to measure: the model on its device, and what the accounting knows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.accounting.bytes import BitWidths, uniform_bits, weight_bytes
from moe.accounting.layers import ModelShape
from moe.accounting.params import count_from_shape
from moe.accounting.quantisation import bits_from_config
from moe.accounting.shape import known_families, shape_from_config
from moe.errors import ConfigError, HostError
from moe.layer import moe_layers
from recipes.cap.hooks import Site, check_sites, find_sites

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class System:
    """A model that is ready to run.

    Attributes:
        name: In tables and figures.
        folder: Where it is from.
        model: In evaluation mode, on its device.
        config: The content of its ``config.json``.
        shape: For the accounting; None where it does not know the family, and utilisations are then None.
        shape_reason: Why it is None.
        bits: Of the tensors as they are in memory.
        bits_source: Where these are from.
        sites: Its mixtures of experts.
        dtype: Of its products.
        device: Where it is.
    """

    name: str
    folder: Path
    model: Any
    config: Mapping[str, Any]
    shape: ModelShape | None
    shape_reason: str | None
    bits: BitWidths
    bits_source: str
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def weights_in_memory(self) -> int:
        """Bytes of all parameters, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence that its config allows, None where it does not say."""
        return longest_sequence(self.config)


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """``max_position_embeddings`` of a config, or of the part that reads text."""
    for part in (config, config.get("text_config") or {}, config.get("dense_config") or {}):
        if isinstance(part.get("max_position_embeddings"), int):
            return int(part["max_position_embeddings"])
    return None


def load_system(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    experts: str | None = None,
) -> System:
    """Loads a checkpoint of transformers or an export of Graft.

    Args:
        name: In tables and figures.
        folder: Local.
        device: Where to.
        dtype: Of the weights; None as in the files.
        experts: transformers' implementation of experts: ``eager``, ``batched_mm``, ``grouped_mm``; None is
            its own choice.

    Raises:
        HostError: It cannot be loaded, or has other parameters than its config says.
        ConfigError: Its config cannot be used.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape, reason = _shape(config)
    model = _load(folder, config, dtype).to(device).eval()
    if experts is not None and not moe_layers(model):
        model.set_experts_implementation(experts)
    sites = tuple(find_sites(model))
    if shape is not None:
        check_sites(sites, shape, str(folder))
    bits, source = _bits(model, config)
    system = System(
        name, folder, model, config, shape, reason, bits, source, sites, _main_dtype(model), device
    )
    _check_parameters(system)
    return system


def _shape(config: Mapping[str, Any]) -> tuple[ModelShape | None, str | None]:
    """Of a family that the accounting knows; a mistake in such a config is one, another family is not."""
    family = config.get("model_type")
    if family in known_families():
        return shape_from_config(config), None
    return None, f"no accounting knows the family {family!r}"


def _load(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    from recipes.hosts.exporters.graft import MODEL_TYPE, load_graft

    if config.get("model_type") == MODEL_TYPE:
        return load_graft(folder, dtype).model
    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto")
    except (ImportError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        rule = f"transformers cannot load it ({first})"
        raise HostError.one("FOLDER", str(folder), rule, "Give a complete decoder checkpoint.") from error


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most elements of the floating-point parameters have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _bits(model: nn.Module, config: Mapping[str, Any]) -> tuple[BitWidths, str]:
    """Bits as loaded: of quantised checkpoints by their config, else by the parameters."""
    inner = config.get("text_config") or config.get("dense_config") or {}
    if config.get("quantization_config") or inner.get("quantization_config"):
        return bits_from_config(config)
    main = _main_dtype(model)
    bits = uniform_bits(8.0 * main.itemsize)
    routers = {p.dtype for _, layer in moe_layers(model) for p in layer.router.parameters()}
    if len(routers) == 1:
        bits = replace(bits, router=8.0 * routers.pop().itemsize)
    return bits, f"{str(main).removeprefix('torch.')}, as loaded"


def _check_parameters(system: System) -> None:
    """Whether the accounting counts the parameters that were loaded: utilisations rest on it."""
    if system.shape is None or system.bits_source.partition(", ")[2] != "as loaded":
        return
    counted = count_from_shape(system.shape).total
    loaded = sum(parameter.numel() for parameter in system.model.parameters())
    if counted != loaded:
        rule = f"{loaded:,} parameters were loaded, its config describes {counted:,}"
        raise ConfigError.one("FOLDER", str(system.folder), rule, "Give the config that the weights are of.")


def counted_weights(system: System) -> float | None:
    """Bytes of all weights by the accounting; should be `System.weights_in_memory`."""
    return None if system.shape is None else weight_bytes(system.shape, system.bits)
