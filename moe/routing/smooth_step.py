"""Smooth step: a sigmoid that is exactly 0 and 1 outside a band, so that gated computation can be skipped.

Source: Hazimeh et al., "The Tree Ensemble Layer" (arXiv 2002.07772, Eq. 4); used by DSelect-k (arXiv
2106.03760) and COMET (arXiv 2306.02824). With ``u = t / gamma + 1/2`` the cubic is ``S = u^2 (3 - 2u)`` and
``1 - S = v^2 (3 - 2v)`` for ``v = 1 - u``: neither subtracts from 1, so that both keep their precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _sides(t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Returns ``u`` and ``v``, clamped to [0, 1]; at least one of them is positive."""
    scaled = t / gamma
    return (0.5 + scaled).clamp(0, 1), (0.5 - scaled).clamp(0, 1)


def smooth_step(t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Computes ``(S(t), 1 - S(t))``: S is 0 for ``t <= -gamma/2``, 1 for ``t >= gamma/2``, a cubic between.

    The gradient is ``6 u (1 - u) / gamma`` inside the band and exactly 0 outside and on its edges.

    Args:
        t: Tensor of any shape.
        gamma: Width of the band, above 0.
    """
    u, v = _sides(t, gamma)
    return u.square() * (3 - 2 * u), v.square() * (3 - 2 * v)


def log_smooth_step(t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Computes ``(log S(t), log(1 - S(t)))``: exactly -inf, with gradient 0, where the value is 0.

    A positive ``u`` is at least one rounding step of 1/2, so that ``2/u``, the largest part of the gradient,
    never overflows; in logarithms a product of many steps does not underflow.
    """
    u, v = _sides(t, gamma)
    return _log_cubic(u), _log_cubic(v)


def _log_cubic(u: Tensor) -> Tensor:
    inside = u > 0
    safe = torch.where(inside, u, 1.0)
    return torch.where(inside, 2 * safe.log() + (3 - 2 * safe).log(), -torch.inf)
