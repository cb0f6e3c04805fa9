"""MXFP4 experts (gpt-oss): 32 values of four bits share a power of two (OCP Microscaling Formats 1.0).

``X_blocks`` is ``[E, N, M / 32, 16]`` bytes, two values each, the lower half first; ``X_scales`` is
``[E, N, M / 32]``, the exponent plus 127. The plain tensor is their transpose ``[E, M, N]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.models.packed.base import PackedError, PackedFormat, Unpacked
from recipes.runtime.safetensors_codec import TensorSpec

_BLOCKS, _SCALES = "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_HALF, *(-value for value in _HALF))


class Mxfp4Format(PackedFormat):
    """MXFP4."""

    name = "mxfp4"
    summary = "four bits with a power of two for each 32"

    def unpacked(self, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Iterator[Unpacked]:
        """See `PackedFormat.unpacked`."""
        for name, spec in tensors.items():
            if not name.endswith(_BLOCKS):
                continue
            stem = name.removesuffix(_BLOCKS)
            scales = tensors.get(stem + _SCALES)
            if (
                scales is None
                or len(spec.shape) != 4
                or scales.shape != spec.shape[:3]
                or spec.shape[3] != 16
            ):
                found = "nothing" if scales is None else list(scales.shape)
                raise PackedError(f"{name} is {list(spec.shape)} and has {found} for {stem}{_SCALES}")
            if {spec.dtype, scales.dtype} != {torch.uint8}:
                raise PackedError(f"{name} and its scales are {spec.dtype} and {scales.dtype}, not bytes")
            E, N, groups, _ = spec.shape
            yield Unpacked(stem, (E, groups * 32, N), (name, stem + _SCALES), _unpack)


def _unpack(parts: Sequence[Tensor]) -> Tensor:
    """Returns ``[E, M, N]`` of blocks ``[E, N, M / 32, 16]`` and exponents ``[E, N, M / 32]``."""
    blocks, exponents = parts
    values = torch.tensor(_VALUES)
    pairs = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1)
    numbers = torch.ldexp(pairs.flatten(-2), exponents.int()[..., None] - 127)
    return numbers.flatten(-2).transpose(1, 2)
