"""Says which weights are no finite numbers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe.errors import ModelError
from recipes.models.hf.weight_files import weight_files


def not_finite(tensor: Tensor) -> str | None:
    """Returns what a tensor holds that is no finite number, ``NaN`` or ``infinity``; None for nothing.

    One pass over memory, several times as fast as any disk.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = (float(end) for end in torch.aminmax(tensor))
    if math.isfinite(low) and math.isfinite(high):
        return None
    return "NaN" if math.isnan(low) else "infinity"


def require_finite(model: nn.Module, folder: Path, option: str) -> None:
    """Checks the weights of a loaded model.

    Raises:
        ModelError: One holds NaN or infinity; it is named.
    """
    for name, parameter in model.named_parameters():
        if (what := not_finite(parameter.detach())) is not None:
            remedy = "Download the checkpoint again, or give one whose weights are all finite."
            raise ModelError.one(option, _file_of(folder, name), f"its tensor {name} holds {what}", remedy)


def _file_of(folder: Path, name: str) -> str:
    """Returns the file of a tensor, which may lack the model's prefix there; the folder if none is known."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if any(key == name or name.endswith(f".{key}") for key in file.keys()):  # noqa: SIM118
                return str(path)
    return str(folder)
