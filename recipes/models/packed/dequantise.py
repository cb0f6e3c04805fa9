"""Writes a quantised checkpoint as a plain one, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.errors import ModelError, choose
from recipes.checkpoint.inventory import require_space
from recipes.models.export.output_folder import output_folder
from recipes.models.export.write_export import dtype_keys, write_companions
from recipes.models.hf.config_file import read_config
from recipes.models.hf.weight_files import packed_names
from recipes.models.packed import PackedFormat, Unpacked, packed_formats
from recipes.models.packed.base import PackedError
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.progress import Progress
from recipes.runtime.safetensors_codec import TensorSpec

_KEY = "quantization_config"
_REMEDY = "Download it again, whole, or give the checkpoint that it was quantised from."
_PARTS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Dequantised:
    """Checkpoint that was dequantised.

    Attributes:
        out: Its folder.
        format: Name of the format that it had.
        dtype: Dtype of the tensors that were packed.
        packed: Number of these.
        copied: Number of tensors that have the source's bytes.
        left_out: Number of tensors that plain weights do not need.
        total_bytes: Bytes of all tensors.
    """

    out: Path
    format: str
    dtype: torch.dtype
    packed: int
    copied: int
    left_out: int
    total_bytes: int


def dequantise(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    log: Callable[[str], None] = lambda line: None,
    *,
    trust_remote_code: bool = False,
) -> Dequantised:
    """Writes a quantised checkpoint as a plain one of the same class.

    A packed value is multiplied by its scale in fp32 and rounded once, to the dtype asked for. Memory holds
    one tensor, in the files' size and in fp32.

    Args:
        folder: The checkpoint.
        out: Folder to write; it must not exist.
        dtype: Of the tensors that are packed; None for that of the config.
        log: Takes lines on the progress.
        trust_remote_code: Whether a tokenizer's own code is trusted, and copied.

    Raises:
        ModelError: It is not quantised, in a format that is not known, or its files do not fit it.
    """
    config, files = read_config(folder), DenseFiles(folder, scaled=True)
    source, settings = _format(folder, config)
    dtype = dtype or _dtype(config)
    specs = {name: stored.spec for name, stored in files.tensors.items()}
    try:
        unpacked = {plain.name: plain for plain in source.unpacked(specs, settings)}
    except PackedError as error:
        raise ModelError.one("FOLDER", str(folder), str(error), _REMEDY) from error
    if not unpacked:
        rule = f"its config.json says {source.name}, and its files hold no such weights"
        raise ModelError.one(
            "FOLDER", str(folder), rule, f"If they are plain, delete {_KEY} from config.json."
        )
    left_out = source.left_out(specs)
    gone = left_out | {part for plain in unpacked.values() for part in plain.parts}
    copied = [spec for name, spec in specs.items() if name not in gone]
    if unread := packed_names(spec.name for spec in copied):
        rule = f"its {unread[0]} is of weights that are not in {source.name}"
        raise ModelError.one("FOLDER", str(folder), rule, _REMEDY)
    wanted = [*copied, *(TensorSpec(plain.name, dtype, plain.shape) for plain in unpacked.values())]
    total = sum(spec.num_bytes for spec in wanted)
    with output_folder(out) as temporary:
        require_space(out, total, "the model")
        with Progress("dequantise", total, "B", log) as progress:
            _write(files, TensorFiles(temporary, wanted), unpacked, copied, progress.update)
        plain_config = _plain_config(config, dtype)
        write_companions(temporary, plain_config, folder, trust_remote_code=trust_remote_code)
    return Dequantised(out, source.name, dtype, len(unpacked), len(copied), len(left_out), total)


def _format(folder: Path, config: dict[str, Any]) -> tuple[PackedFormat, dict[str, Any]]:
    """Returns the format that a config names, and its settings."""
    found = [part[_KEY] for part in _levels(config) if isinstance(part.get(_KEY), dict)]
    if not found:
        rule = f"its config.json has no {_KEY}: it is not quantised"
        raise ModelError.one("FOLDER", str(folder), rule, "Use it as it is.")
    formats, name = packed_formats(), str(found[0].get("quant_method"))
    if name not in formats:
        rule = f"it is quantised by {name}, which is not known here"
        remedy = f"Give the checkpoint that it was quantised from; {choose(name, formats)}"
        raise ModelError.one("FOLDER", str(folder), rule, remedy)
    return formats[name], found[0]


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(config[key] for key in _PARTS if isinstance(config.get(key), dict))]


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """Returns the dtype that a config names, else bf16, in which quantised models compute."""
    for part in _levels(config):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype) and found in (torch.float32, torch.bfloat16, torch.float16):
                return found
    return torch.bfloat16


def _plain_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns a config without the format, and with the dtype."""
    plain = {
        key: dict(value) if key in _PARTS and isinstance(value, dict) else value
        for key, value in config.items()
    }
    for part in _levels(plain):
        part.pop(_KEY, None)
        part.update({key: value for key, value in dtype_keys(dtype).items() if key in part})
    return plain


def _write(
    files: DenseFiles,
    target: TensorFiles,
    unpacked: dict[str, Unpacked],
    copied: list[TensorSpec],
    progress: Callable[[int], None],
) -> None:
    for spec in copied:
        stored = files.tensors[spec.name]
        target.copy(spec.name, files.handle(stored.file), stored.start)
        progress(spec.num_bytes)
    for name, plain in unpacked.items():
        spec = target.spec(name)
        target.write(name, plain.unpack([files.read(part) for part in plain.parts]).to(spec.dtype))
        progress(spec.num_bytes)
    target.finish()
    files.close()
