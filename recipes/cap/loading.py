"""Loads a folder as a system to measure: the model on its device, with the facts of the accounting."""

from __future__ import annotations

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
from moe.errors import ConfigError, Mistake, ModelError
from moe.layer import moe_layers
from recipes.cap.folders import Source, read_config
from recipes.cap.hooks import Site, check_sites, find_sites
from recipes.checkpoint.reader import open_checkpoint
from recipes.models.hf.config_file import library_reads, load_config, trusts

# Prefix of the model's tensors in a checkpoint of a run.
_IN_CHECKPOINT = "model."
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts that the accounting knows about a system.

    Attributes:
        shape: None where it does not know the family, and utilisations are then None.
        shape_reason: Reason why it is None.
        bits: Bits of the tensors in memory.
        bits_source: Source of the bits.
    """

    shape: ModelShape | None
    shape_reason: str | None
    bits: BitWidths
    bits_source: str


@dataclass(frozen=True, kw_only=True)
class System(Known):
    """A model that is ready to run.

    Attributes:
        name: In tables and figures.
        source: Location of its files.
        model: In evaluation mode, on its device.
        config: The content of its ``config.json``.
        sites: Its MoE layers.
        dtype: Dtype of its products.
        device: Device of the model.
    """

    name: str
    source: Source
    model: Any
    config: Mapping[str, Any]
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def weights_in_memory(self) -> int:
        """Bytes of all parameters, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence that its config allows; None where it sets no limit."""
        return whole_number(self.config, "max_position_embeddings")


def whole_number(config: Mapping[str, Any], key: str) -> int | None:
    """Returns a whole number of a config, or of its part for text; None where there is none."""
    parts = (config, config.get("text_config") or {}, config.get("dense_config") or {})
    return next((part[key] for part in parts if isinstance(part.get(key), int)), None)


def load_system(
    name: str,
    source: Source,
    device: torch.device,
    dtype: torch.dtype | None = None,
    experts: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> System:
    """Loads a checkpoint of transformers, an export of Graft, or a model of a run.

    Args:
        name: In tables and figures.
        source: Result of `recipes.cap.folders.find_source`.
        device: Device of the model.
        dtype: Dtype of the weights; None for that of the files.
        experts: transformers' implementation of experts: ``eager``, ``batched_mm``, ``grouped_mm``; None is
            its own choice.
        trust_remote_code: Whether the folder's own code may run.

    Raises:
        ModelError: It cannot be loaded, or its parameters differ from its config.
        ConfigError: Its config cannot be used.
    """
    config = read_config(source)
    if isinstance(config, Mistake):
        raise ConfigError([config])
    shape, reason = shape_of(config)
    model = _load(source.folder, config, dtype, trust_remote_code)
    if source.trained is not None:
        _take_weights(model, source.trained)
    model = model.to(device).eval()
    if experts is not None and not moe_layers(model):
        model.set_experts_implementation(experts)
    sites = tuple(find_sites(model))
    if shape is not None:
        check_sites(sites, shape, str(source.given))
    bits, bits_source = _bits(model, config)
    system = System(
        shape=shape,
        shape_reason=reason,
        bits=bits,
        bits_source=bits_source,
        name=name,
        source=source,
        model=model,
        config=config,
        sites=sites,
        dtype=_main_dtype(model),
        device=device,
    )
    _check_parameters(system)
    return system


def shape_of(config: Mapping[str, Any]) -> tuple[ModelShape | None, str | None]:
    """Returns the shape of a known family, else None and the reason; a wrong config of a known one raises."""
    inner = config.get("dense_config")  # of an export in Graft's format
    families = [part.get("model_type") for part in (config, inner) if isinstance(part, Mapping)]
    for family in families:
        if family not in known_families():
            return None, f"no accounting knows the family {family!r}"
    return shape_from_config(config), None


@torch.no_grad()
def _take_weights(model: nn.Module, checkpoint: Path) -> None:
    """Puts the weights of a run's checkpoint into the model that it was trained from.

    Raises:
        ModelError: It lacks some.
    """
    with open_checkpoint(checkpoint) as tensors:
        there = set(tensors.names(_IN_CHECKPOINT))
        lost = [name for name, _ in model.named_parameters() if name not in there]
        if lost:
            rule = f"it lacks {len(lost)} tensors of the model, such as {lost[0]}"
            raise ModelError.one("FOLDER", str(checkpoint), rule, "Give the folder of a checkpoint.")
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.read(_IN_CHECKPOINT + name))


def _load(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    from recipes.models.export.graft_format import MODEL_TYPE, load_graft

    if config.get("model_type") == MODEL_TYPE:
        return load_graft(folder, dtype, trust_remote_code=trust).module
    built = load_config(folder, trust_remote_code=trust, option="FOLDER")
    with library_reads("FOLDER", folder, "Give a complete decoder checkpoint.", "load it"):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=built,
            local_files_only=True,
            trust_remote_code=trusts(folder, trust),
            dtype=dtype or "auto",
        )


def _main_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype that most elements of the floating-point parameters have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _bits(model: nn.Module, config: Mapping[str, Any]) -> tuple[BitWidths, str]:
    """Returns the bits as loaded: from the config of a quantised checkpoint, else from the parameters."""
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
    """Checks that the accounting counts as many parameters as were loaded: utilisations depend on it."""
    if system.shape is None or system.bits_source.partition(", ")[2] != "as loaded":
        return
    counted = count_from_shape(system.shape).total
    loaded = sum(parameter.numel() for parameter in system.model.parameters())
    if counted != loaded:
        rule = f"{loaded:,} parameters were loaded, its config describes {counted:,}"
        remedy = "Give the config that the weights are of."
        raise ConfigError.one("FOLDER", str(system.source.given), rule, remedy)


def counted_weights(known: Known) -> float | None:
    """Counts the bytes of all weights, which should equal `System.weights_in_memory`."""
    return None if known.shape is None else weight_bytes(known.shape, known.bits)


def known_from_config(config: Mapping[str, Any], dtype: str | None) -> tuple[Known, torch.dtype]:
    """Describes a model that is not loaded, with bits and dtype of its config, else of the user.

    Args:
        config: The content of its ``config.json``.
        dtype: A key of `DTYPES` for everything that is not quantised; None is the config's.
    """
    shape, reason = shape_of(config)
    if dtype is not None:
        config = {**config, "dtype": dtype}
    bits, source = bits_from_config(config)
    known = Known(shape=shape, shape_reason=reason, bits=bits, bits_source=source)
    # norms are never quantised
    return known, {32.0: torch.float32}.get(bits.vector, torch.bfloat16)
