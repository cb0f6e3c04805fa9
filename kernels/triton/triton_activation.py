"""Activations of `kernels.activations` inside Triton kernels: value and derivative in fp32.

Comparisons are written so that NaN passes them, as torch's do.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2 sqrt(2 / pi), 1 / sqrt(2), 1 / sqrt(2 pi). The interpreter wants a constant right of a block.
_TANH_SLOPE = tl.constexpr(1.5957691216057308)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_PEAK = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(x):
    """Returns ``1 / (1 + exp(-x))``; exp overflows to infinity, which gives the right zero."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Returns ``f(x)`` for a block in fp32; ACT is a value of `CODES`."""
    if ACT == "silu":
        y = x * sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), free of the cancellation that 1 + tanh(u) has below zero.
        y = x * sigmoid((x + 0.044715 * x * x * x) * _TANH_SLOPE)
    elif ACT == "relu":
        y = tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACT == "relu2", "no such activation")
        kept = tl.where(x < 0, 0.0, x)
        y = kept * kept
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """Returns ``f'(x)``; zero at the kink of relu and relu2, as in torch."""
    if ACT == "silu":
        s = sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _NORMAL_PEAK * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        u = (x + 0.044715 * x * x * x) * _TANH_SLOPE
        du = (1.0 + 3.0 * 0.044715 * x * x) * _TANH_SLOPE
        y = sigmoid(u) + x * sigmoid(u) * sigmoid(-u) * du
    elif ACT == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACT == "relu2", "no such activation")
        y = 2.0 * tl.where(x < 0, 0.0, x)
    return y


#: Key of `kernels.activations.ACTIVATIONS` -> name inside the kernels. An activation that is applied to the
#: value half as well has the same name as without, and ON_VALUE.
CODES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "drelu": "relu",
}
