"""Codecs that hold an expert's difference from the base of its layer in few bytes.

DeRS (arXiv 2503.01359): experts upcycled from one network stay close to it, so a base and small differences
suffice: nine of ten differences dropped at random, or two bits for each. A difference of 0, as for copies
before training, is held exactly.

Letters: M rows, N columns of a matrix, B elements of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe.routing.draws import hashed_uniform, mix32

_BITS32 = 0xFFFFFFFF
# Step of the uniform quantiser with least squared error for a Gaussian of deviation 1, by bits: minimised
# numerically; up to 4 bits they equal those of Max 1960, "Quantizing for minimum distortion".
_STEPS = {1: 1.5956, 2: 0.9957, 4: 0.3352, 8: 0.03076}
Shape = tuple[int, ...]


class DeltaCodec(ABC):
    """Codec for differences."""

    @abstractmethod
    def parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, Shape]]:
        """Returns dtype and shape, by name, of the tensors that `encode` makes of such a matrix."""

    @abstractmethod
    def encode(self, delta: Tensor, key: str) -> dict[str, Tensor]:
        """Encodes a difference.

        Args:
            delta: Difference of any shape, fp32.
            key: Name of the matrix; the same for `decode`.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: Shape, key: str) -> Tensor:
        """Returns the approximate difference in fp32."""


@dataclass(frozen=True)
class SparseDelta(DeltaCodec):
    """Codec that keeps one element of every block of ``one_of``, at a place chosen by a hash.

    The paper drops at random; one per block is as random and needs no index, as the places follow from seed
    and key.

    Attributes:
        one_of: B.
        rescale: Multiplies kept elements by B, so that the difference is unbiased.
        seed: Seed of the places.
    """

    one_of: int = 10
    rescale: bool = False
    seed: int = 0

    def parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, Shape]]:
        """Returns the kept values, in the matrix's dtype."""
        return {"values": (dtype, (-(-torch.Size(shape).numel() // self.one_of),))}

    def encode(self, delta: Tensor, key: str) -> dict[str, Tensor]:
        """See `DeltaCodec.encode`."""
        return {"values": delta.flatten()[self._places(delta.numel(), key)]}

    def decode(self, parts: Mapping[str, Tensor], shape: Shape, key: str) -> Tensor:
        """See `DeltaCodec.decode`."""
        count = torch.Size(shape).numel()
        flat = torch.zeros(count)
        factor = float(self.one_of) if self.rescale else 1.0
        flat[self._places(count, key)] = parts["values"].float() * factor
        return flat.view(shape)

    def _places(self, count: int, key: str) -> Tensor:
        start = torch.arange(0, count, self.one_of)
        salt = int(hashed_uniform(self.seed, "delta", key) * 2**32)
        block = start // self.one_of
        bits = mix32(mix32((block & _BITS32) ^ salt) ^ (block >> 32))
        return start + bits % (count - start).clamp(max=self.one_of)


@dataclass(frozen=True)
class QuantisedDelta(DeltaCodec):
    """Codec with a few bits per element, and a step per row.

    Attributes:
        bits: 1, 2, 4 or 8.
    """

    bits: int = 2

    def parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, Shape]]:
        """Returns the levels, packed along the rows, and the steps in fp32."""
        *rows, width = shape
        packed = -(-width * self.bits // 8)
        return {"packed": (torch.uint8, (*rows, packed)), "step": (torch.float32, (*rows, 1))}

    def encode(self, delta: Tensor, key: str) -> dict[str, Tensor]:
        """See `DeltaCodec.encode`."""
        step_M1 = _STEPS[self.bits] * delta.square().mean(-1, keepdim=True).sqrt()
        half, per_byte = 1 << (self.bits - 1), 8 // self.bits
        # A row of zeros has step 0, so that any level decodes to 0.
        level = torch.floor(delta / step_M1.clamp_min(torch.finfo(torch.float32).tiny)) + half
        level = level.clamp(0, 2 * half - 1).to(torch.uint8)
        level = pad(level, (0, -level.shape[-1] % per_byte))
        level = level.view(*level.shape[:-1], -1, per_byte)
        shift = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        return {"packed": (level << shift).sum(-1, dtype=torch.uint8), "step": step_M1}

    def decode(self, parts: Mapping[str, Tensor], shape: Shape, key: str) -> Tensor:
        """See `DeltaCodec.decode`."""
        half = 1 << (self.bits - 1)
        shift = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        level = ((parts["packed"][..., None] >> shift) & (2 * half - 1)).flatten(-2)[..., : shape[-1]]
        return (level.float() - half + 0.5) * parts["step"]
