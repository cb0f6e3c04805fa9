"""Exports a dense model that a run has trained on, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from recipes.checkpoint import require_space
from recipes.checkpoint.reader import CheckpointTensors
from recipes.models.export.output_folder import output_folder
from recipes.models.export.write_export import dtype_keys, write_companions
from recipes.models.hf.config_file import read_config, trusts
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.safetensors_codec import TensorSpec

# What a model's tensors are called in a checkpoint, beside those of the optimizer.
MODEL_PREFIX = "model."


def write_dense(
    tensors: CheckpointTensors,
    dense: Path,
    dtype: torch.dtype,
    out: Path,
    check: Callable[[Path], None],
    *,
    trust_remote_code: bool = False,
) -> int:
    """Writes the weights with the config and the tokenizer of the model that the training began with.

    Args:
        tensors: The checkpoint.
        dense: That model.
        dtype: Dtype of the floating-point tensors.
        out: Where to; it must not exist.
        check: Checks the files before they get their name.
        trust_remote_code: Whether the model was computed by code of its own where it brings some.

    Returns:
        Bytes of the tensors.

    Raises:
        DiskError: There is not enough space.
        InUseError: Another process is writing it.
    """
    specs = []
    for name in tensors.names(MODEL_PREFIX):
        stored = tensors.dtype(MODEL_PREFIX + name)
        kind = dtype if stored.is_floating_point else stored
        specs.append(TensorSpec(name, kind, tensors.shape(MODEL_PREFIX + name)))
    total = sum(spec.num_bytes for spec in specs)
    with output_folder(out) as temporary:
        require_space(out, total, "the model")
        files = TensorFiles(temporary, specs)
        for spec in specs:
            files.write(spec.name, tensors.read(MODEL_PREFIX + spec.name))
        files.finish()
        config = read_config(dense)
        if not trusts(dense, trust_remote_code):
            config.pop("auto_map", None)
        config |= dtype_keys(dtype)
        write_companions(temporary, config, dense, trust_remote_code=trust_remote_code)
        check(temporary)
    return total
