"""FP8 weights with a scale for each block: DeepSeek-V3, Qwen3, GLM, MiniMax-M2 and others.

``X.weight`` in e4m3 goes with ``X.weight_scale_inv``, a scale for each block of, usually, 128 x 128
(DeepSeek-V3, arXiv 2412.19437, section 3.3). Blocks at the ends of rows and columns may be cut: 576 rows have
five blocks, the last of 64 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.models.packed.base import PackedError, PackedFormat, Unpacked
from recipes.runtime.safetensors_codec import TensorSpec

_SCALE = "_scale_inv"
_ACTIVATIONS = (".input_scale", ".activation_scale")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Format(PackedFormat):
    """FP8 with scales by block, or one scale for a tensor."""

    name = "fp8"
    summary = "FP8 with a scale for each block"

    def unpacked(self, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Iterator[Unpacked]:
        """See `PackedFormat.unpacked`."""
        block = _block(config)
        for name, spec in tensors.items():
            if spec.dtype not in _FLOAT8:
                continue
            scale = tensors.get(name + _SCALE)
            if scale is None:
                raise PackedError(f"{name} is FP8 and has no {name}{_SCALE} beside it")
            rows, columns = _cut_to(name, spec, scale, block)

            def unpack(
                parts: Sequence[Tensor],
                rows: int = rows,
                columns: int = columns,
                shape: tuple[int, ...] = spec.shape,
            ) -> Tensor:
                return _scaled(parts[0], _factors(parts[1]), rows, columns).reshape(shape)

            yield Unpacked(name, spec.shape, (name, name + _SCALE), unpack)

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> set[str]:
        """See `PackedFormat.left_out`."""
        return {name for name in tensors if name.endswith(_ACTIVATIONS)}


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns rows and columns of a block; None where a tensor has one scale."""
    block = config.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise PackedError(f"weight_block_size={block!r} of its quantization_config is no pair of sizes")
    return block[0], block[1]


def _cut_to(name: str, spec: TensorSpec, scale: TensorSpec, block: tuple[int, int] | None) -> tuple[int, int]:
    """Returns rows and columns that share a scale: from the config, as the grid may be ragged."""
    *stack, rows, columns = spec.shape if len(spec.shape) > 1 else (1, *spec.shape)
    if block is None:
        if torch.Size(scale.shape).numel() != torch.Size(stack).numel():
            raise PackedError(
                f"{name}{_SCALE} is {list(scale.shape)}, and no weight_block_size says how it goes"
            )
        return rows, columns
    grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != grid:
        rule = f"{name} is {list(spec.shape)}, in blocks of {block[0]} x {block[1]}"
        raise PackedError(f"{rule}, and its scales are {list(scale.shape)}, not {list(grid)}")
    return block


def _factors(scale: Tensor) -> Tensor:
    """Returns scales in fp32; bytes are exponents of two, less 127 (ue8m0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _scaled(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Multiplies ``[..., R, C]`` by scales ``[..., ceil(R / rows), ceil(C / columns)]``."""
    found = (
        weight.reshape(-1, *weight.shape[-2:]).float() if weight.dim() > 1 else weight.view(1, 1, -1).float()
    )
    height, width = found.shape[-2:]
    scale = scale.reshape(len(found), -(-height // rows), -(-width // columns))
    for number in range(scale.shape[1]):
        factors = scale[:, number].repeat_interleave(columns, dim=-1)[:, None, :width]
        found[:, number * rows : (number + 1) * rows].mul_(factors)
    return found
