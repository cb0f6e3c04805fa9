"""Activations of experts: value and derivative, each able to write into a given buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """Elementwise function of an expert.

    Attributes:
        forward: ``forward(x)``; differentiable by autograd.
        forward_out: ``forward_out(x, out)`` writes the value into ``out``.
        backward_out: ``backward_out(grad, x, out)`` writes ``grad * f'(x)`` into ``out``, which may
            be ``grad`` itself.
        on_value: Whether the function is applied to the value half of a gated expert as well. Such an
            activation needs a gate.
    """

    forward: Callable[[Tensor], Tensor]
    forward_out: Callable[[Tensor, Tensor], Tensor]
    backward_out: Callable[[Tensor, Tensor, Tensor], Tensor]
    on_value: bool = False

    def hidden(self, gate: Tensor, value: Tensor) -> Tensor:
        """Returns a gated expert's input to down: ``f(gate) * value``, or ``f(gate) * f(value)``."""
        return self.forward(gate) * (self.forward(value) if self.on_value else value)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda x, out: _aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


def _relu2_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.mul(grad, x.relu().mul_(2), out=out)


_SILU = Activation(
    F.silu,
    lambda x, out: _aten.silu.out(x, out=out),
    lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
)
_RELU = Activation(
    F.relu,
    lambda x, out: torch.clamp_min(x, 0, out=out),
    lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
)
_RELU2 = Activation(
    lambda x: F.relu(x).square(),
    lambda x, out: torch.clamp_min(x, 0, out=out).square_(),
    _relu2_backward,
)
_GELU_TANH = _gelu("tanh")

#: Activations by the names in transformers' configs. Not a MappingProxyType: torch.compile cannot read one
#: once the traced code has changed any dict.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": _gelu("none"),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": _RELU,
    "relu2": _RELU2,
    # dReLU of TurboSparse, arXiv 2406.05955: down(relu(gate) * relu(up)).
    "drelu": replace(_RELU, on_value=True),
}


def activation_unsupported_reason(name: str, gated: bool) -> str | None:
    """Returns why experts cannot have this activation, as a clause; None when they can.

    Args:
        name: Any name.
        gated: Whether the experts have a gate.
    """
    if name not in ACTIVATIONS:
        return f"there is no activation {name!r}; there are: {', '.join(ACTIVATIONS)}"
    if ACTIVATIONS[name].on_value and not gated:
        return f"{name} is applied to gate and value alike, and these experts have no gate: use relu"
    return None
