"""Writes a GGUF file as a folder of transformers: dequantised weights, config, tokenizer and chat template.

The package gguf reads the file, and transformers maps its tensors to the model's names. What they round is
mended here, and the folder is read back before it gets its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.models.export.output_folder import output_folder
from recipes.models.hf.config_file import library_reads
from recipes.models.hf.finite_weights import require_finite
from recipes.runtime.extras import check_extra

_MAGIC = b"GGUF"
_FLAG = "FILE"


@dataclass(frozen=True)
class Imported:
    """A GGUF file that has become a folder.

    Attributes:
        path: The folder.
        model_type: Family, in transformers' words.
        parameters: Number of weights, tied ones once.
        formats: Number of tensors by the format that the file has them in.
        dtype: Dtype of the weights written.
        changed: Share of the weights that the dtype rounds.
        has_template: Whether the tokenizer has a chat template: then the model was trained to answer.
    """

    path: Path
    model_type: str
    parameters: int
    formats: dict[str, int]
    dtype: torch.dtype
    changed: float
    has_template: bool

    def lines(self) -> list[str]:
        """Returns what a user should know of it."""
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        kind = "it has a chat template" if self.has_template else "no chat template: a base model"
        dtype = str(self.dtype).removeprefix("torch.")
        rounded = f"; {self.changed:.1%} of the weights are rounded" if self.changed else ""
        return [
            f"read: {self.model_type}, {self.parameters:,} parameters in {formats}; {kind}",
            f"written: {self.path} in {dtype}{rounded}; read back by transformers, equal to the bit",
        ]


def import_gguf(file: Path, out: Path, dtype: torch.dtype = torch.float32) -> Imported:
    """Writes a GGUF file as a folder of transformers.

    Args:
        file: The file.
        out: The folder; it must not exist.
        dtype: Of the weights. Only fp32 holds what a quantised file says without rounding.

    Raises:
        ModelError: It is no GGUF file, is damaged, or of a family that transformers does not read from one.
        ConfigError: The output exists already.
    """
    formats = _formats(file)
    with output_folder(out) as folder:
        model, tokenizer = _load(file)
        require_finite(model, file, _FLAG)
        changed = _share_rounded(model.parameters(), dtype)
        model.to(dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _read_back(folder, model)
    parameters = sum(p.numel() for p in model.parameters())
    has_template = tokenizer.chat_template is not None
    return Imported(out, model.config.model_type, parameters, formats, dtype, changed, has_template)


def _formats(file: Path) -> dict[str, int]:
    """Counts the tensors of a file by format.

    Raises:
        ModelError: It is no GGUF file, or a damaged one.
    """
    remedy = "Give a file that ends in .gguf, whole and of one part."
    if mistake := check_extra("real", _FLAG, str(file), "give a folder of transformers"):
        raise ModelError([mistake])
    if not file.is_file():
        raise ModelError.one(_FLAG, str(file), "there is no such file", remedy)
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ModelError.one(_FLAG, str(file), "it does not begin as a GGUF file does", remedy)
    with library_reads(_FLAG, file, remedy, "find the tensors of this file"):
        from gguf import GGUFReader

        return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(str(file)).tensors))


def _load(file: Path) -> tuple[Any, Any]:
    """Returns the model in fp32 and the tokenizer.

    Raises:
        ModelError: transformers cannot read the file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with library_reads(_FLAG, file, "Is its family one that transformers reads from GGUF?"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        config = AutoConfig.from_pretrained(file.parent, **where)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # `from_pretrained` wants accelerate for this, and a model that it does not save afterwards.
        found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        tensors = {name: torch.as_tensor(tensor).float() for name, tensor in found.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    if wrong := sorted({*missing} - {*tied}) + sorted(unexpected):
        rule = f"transformers finds no place for, or nothing for, {len(wrong)} weights, {wrong[0]} the first"
        raise ModelError.one(_FLAG, str(file), rule, "Download the file again.")
    vars(config).pop("_model_name_or_path", None)
    _unround(config)
    return model.eval(), tokenizer


def _unround(config: Any) -> None:
    """Gives numbers that the file has in fp32 their shortest decimals: 1e-5, not 9.999999747378752e-06."""
    for name, value in vars(config).items():
        if isinstance(value, dict):
            vars(config)[name] = {key: _shortest(x) for key, x in value.items()}
        else:
            setattr(config, name, _shortest(value))


def _shortest(value: Any) -> Any:
    is_single = isinstance(value, float) and float(np.float32(value)) == value
    return float(str(np.float32(value))) if is_single else value


def _share_rounded(params: Iterable[Tensor], dtype: torch.dtype) -> float:
    """Returns the share of fp32 weights that another dtype rounds."""
    pairs = [(int((p.to(dtype).float() != p).sum()), p.numel()) for p in params]
    return sum(changed for changed, _ in pairs) / sum(count for _, count in pairs)


def _read_back(folder: Path, model: Any) -> None:
    """Loads what was written as anybody would, and compares every weight and what the config says."""
    from transformers import AutoModelForCausalLM

    with library_reads(_FLAG, folder, "Report it: this is a fault of Graft.", "read back what was written"):
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    wanted, found = model.state_dict(), again.state_dict()
    wrong = [name for name in wanted if name not in found or not torch.equal(wanted[name], found[name])]
    if wrong:
        rule = f"what was written reads back otherwise, {wrong[0]} the first of {len(wrong)} tensors"
        raise ModelError.one(_FLAG, str(folder), rule, "Report it: this is a fault of Graft.")
