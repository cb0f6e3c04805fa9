"""Reads an export back block by block, within a limit of memory.

The blocks of a decoder run one after the other. Each block is given its weights before it runs; if the model
exceeds the limit, they are dropped afterwards. Embeddings, head and other weights outside the blocks stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from moe.errors import ModelError
from recipes.models.hf.config_file import load_config
from recipes.models.hf.deferred_init import deferred_model
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.weight_files import weight_files
from recipes.runtime.heartbeat import Heartbeat


class Unread(ABC):
    """An exported model in fp32 whose parameters have no memory yet.

    Attributes:
        model: The module that transformers builds from the export's config.
        folder: The export.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder

    @abstractmethod
    def fill(self, wanted: Callable[[str], bool]) -> None:
        """Reads the parameters and buffers whose names are wanted.

        Raises:
            ModelError: A tensor of the files does not fit the model.
        """


class NativeUnread(Unread):
    """Exported model that is read by transformers' own loader, a part of the files at a time."""

    def __init__(self, folder: Path) -> None:
        """Reads only the config."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        super().__init__(deferred_model(load_config(folder)), folder)
        self._mapping = get_model_conversion_mapping(self.model)

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """See `Unread.fill`."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        slices = {}
        for path in weight_files(self.folder):
            file = safe_open(path, framework="pt")
            names = filter(wanted, file.keys())
            slices |= {name: file.get_slice(name) for name in names}
        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping)
        info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        wrong = [*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
        if wrong:
            raise unsupported_reason(self.folder, f"transformers cannot use {wrong[:3]}")


class ReadBack:
    """Exported model that can run.

    Attributes:
        model: The module, in evaluation mode.
        stays: Whether all weights stay in memory once they are read.
    """

    def __init__(self, unread: Unread, memory_bytes: float, heartbeat: Heartbeat | None = None) -> None:
        """Reads the weights outside the blocks.

        Args:
            unread: The export.
            memory_bytes: Limit in fp32; a model within it stays in memory.
            heartbeat: Notified of each block.

        Raises:
            ModelError: The files lack a tensor, or hold one that does not fit.
        """
        self._unread = unread
        self._heartbeat = heartbeat or Heartbeat()
        self.model = model = unread.model
        blocks = decoder_blocks(model, model.config.get_text_config())
        [place] = [name for name, module in model.named_modules() if module is blocks]
        self.stays = sum(p.numel() * p.element_size() for p in model.parameters()) <= memory_bytes
        self._fill(lambda name: not name.startswith(f"{place}."))
        model.tie_weights()
        inside = {id(parameter) for parameter in blocks.parameters()}
        self._require([name for name, p in model.named_parameters() if p.is_meta and id(p) not in inside])
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._read, f"{place}.{number}."))
            if not self.stays:
                block.register_forward_hook(_drop)

    def _read(self, prefix: str, block: nn.Module, args: Any) -> None:
        self._heartbeat.progress()
        if not any(parameter.is_meta for parameter in block.parameters()):
            return
        self._fill(lambda name: name.startswith(prefix))
        self._require([prefix + name for name, p in block.named_parameters() if p.is_meta])

    @torch.no_grad()
    def _fill(self, wanted: Callable[[str], bool]) -> None:
        self._unread.fill(wanted)

    def _require(self, missing: list[str]) -> None:
        if missing:
            raise unsupported_reason(self._unread.folder, f"no file holds {', '.join(missing[:3])}")


def _drop(block: nn.Module, args: Any, out: Any) -> None:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def unsupported_reason(folder: Path, rule: str) -> ModelError:
    """Makes the error for an export that cannot be read back."""
    return ModelError.one("export", str(folder), rule, "Export the run again: its checkpoints are whole.")
