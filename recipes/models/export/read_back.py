"""Runs a checkpoint folder block by block, within a limit of memory, read by transformers' own loader.

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
from recipes.models.hf.config_file import load_config, trusts
from recipes.models.hf.deferred_init import deferred_model
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.runtime.heartbeat import Heartbeat


class Unread(ABC):
    """A model in fp32 whose parameters have no memory yet.

    Attributes:
        model: The module that transformers builds from the folder's config.
        folder: The folder that it is read from.
        option: Name of the folder in errors.
        remedy: Remedy where it cannot be read.
    """

    option = "export"
    remedy = "Export the run again from its checkpoint."

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder

    @abstractmethod
    def fill(self, wanted: Callable[[str], bool]) -> None:
        """Reads the parameters and buffers whose names are wanted.

        Raises:
            ModelError: A tensor of the files does not fit the model.
        """

    def tie(self) -> None:
        """Ties the weights that the model ties, once those outside its blocks are read."""
        self.model.tie_weights()


class NativeUnread(Unread):
    """Model that is read by transformers' own loader, a part of the files at a time.

    transformers alone decides which files count, what their tensors are called in the model, and what is
    tied: a fault of Graft's own reader is not repeated here.
    """

    #: Whether tensors that the model has no place for are an error.
    refuses_more = True

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """Reads the config and the names in the files.

        Args:
            folder: The checkpoint.
            trust_remote_code: Whether the model may run its own code.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping

        trust = trusts(folder, trust_remote_code)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        super().__init__(deferred_model(config, trust_remote_code=trust), folder)
        self._mapping = get_model_conversion_mapping(self.model)
        self._stored = self._find()

    def _find(self) -> list[tuple[str, str, str]]:
        """Lists file, name in it and name in the model of all tensors."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.modeling_utils import _get_resolved_checkpoint_files

        named = getattr(self.model.config, "transformers_weights", None)
        files, _ = _get_resolved_checkpoint_files(
            str(self.folder), None, None, None, None, False, named, {"local_files_only": True}
        )
        rules = self._mapping or []
        renamings, converters = (
            [rule for rule in rules if isinstance(rule, kind)] for kind in (WeightRenaming, WeightConverter)
        )
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        found = []
        for path in files or ():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    own = rename_source_key(name, renamings, converters, prefix, state)[0]
                    if own not in state and name in state:
                        own = name
                    found.append((path, name, own))
        return found

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """See `Unread.fill`."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names: dict[str, list[str]] = {}
        for path, name, own in self._stored:
            if wanted(own):
                names.setdefault(path, []).append(name)
        slices = {}
        for path, inside in names.items():
            file = safe_open(path, framework="pt")
            slices |= {name: file.get_slice(name) for name in inside}
        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping)
        info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
        if self.refuses_more:
            wrong += info.unexpected_keys
        if wrong:
            raise _unreadable(self, f"transformers cannot use {wrong[:3]}")

    def tie(self) -> None:
        """Ties as `from_pretrained` does, which looks at what the files hold."""
        missing = self.model.state_dict().keys() - {own for _, _, own in self._stored}
        self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)


class DenseUnread(NativeUnread):
    """Dense checkpoint, as somebody has published it: leftovers in its files are no error."""

    option, remedy, refuses_more = "dense", "Download the checkpoint again.", False


class ReadBack:
    """Model that runs from its files.

    Attributes:
        model: The module, in evaluation mode.
        stays: Whether all weights stay in memory once they are read.
    """

    def __init__(self, unread: Unread, memory_bytes: float, heartbeat: Heartbeat | None = None) -> None:
        """Reads the weights outside the blocks.

        Args:
            unread: The model.
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
        unread.tie()
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
            raise _unreadable(self._unread, f"no file holds {', '.join(missing[:3])}")


def _drop(block: nn.Module, args: Any, out: Any) -> None:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _unreadable(unread: Unread, rule: str) -> ModelError:
    return ModelError.one(unread.option, str(unread.folder), rule, unread.remedy)
