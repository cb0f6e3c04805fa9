"""Buffers that stay fp32 whatever dtype a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """Mix-in for modules whose state moves by small steps: a bias of 1 in bf16 does not feel a step of 0.001.

    ``model.to(torch.bfloat16)`` casts buffers like parameters; those named here keep their fp32 values.

    Attributes:
        fp32_buffers: Names of the buffers.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        before = {name: getattr(self, name) for name in self.fp32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            cast = getattr(self, name)
            if cast.dtype != torch.float32:
                setattr(self, name, cast.float() if value.is_meta else value.float().to(cast.device))
        return self
