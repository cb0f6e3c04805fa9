"""Shape of a dense feed-forward network, by which methods are checked; it imports no torch.

Letters: D model width, F width of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake

Matrix = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class FFNShape:
    """Shape of a dense network, known before its weights are read.

    Attributes:
        width: F.
        model_width: D.
        gated: True if there is a gate beside the up projection.
        up_bias: True if gate and up projection have biases.
        down_bias: True if the down projection has a bias.
        activation: A key of `kernels.activations.ACTIVATIONS`.
    """

    width: int
    model_width: int
    gated: bool
    activation: str
    up_bias: bool = False
    down_bias: bool = False

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of the network."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


def division_mistakes(
    shape: FFNShape | None, parts: int, option: str, value: int, remedy: str
) -> list[Mistake]:
    """Requires that the dense neurons divide into parts of one size.

    Args:
        shape: Shape of the dense network; None while unknown.
        parts: Number of parts.
        option: Option of the method that decides it.
        value: Its value.
        remedy: What the user can do, as a sentence.
    """
    if shape is None or shape.width % parts == 0:
        return []
    rule = f"the {shape.width} neurons of the dense network do not divide into {parts} parts"
    return [Mistake(f"upcycle.{option}", value, rule, remedy)]


def width_mistakes(shape: FFNShape | None, expert_width: int | None) -> list[Mistake]:
    """Requires experts no wider than the dense network that they are cut from."""
    if shape is None or expert_width is None or expert_width <= shape.width:
        return []
    rule = f"the dense network has {shape.width} neurons, and an expert takes some of them"
    return [Mistake("upcycle.expert_width", expert_width, rule, f"Set {shape.width} or less, or null.")]
