"""Weights of a dense feed-forward network and of a layer's experts, which upcycling turns into each other.

Letters: D model width, E experts, F width of the dense network or of an expert, U = 2F when gated, else F.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FFNWeights:
    """Weights of one dense feed-forward network.

    Attributes:
        up_FD: ``[F, D]`` up projection.
        down_DF: ``[D, F]`` down projection.
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gate_FD: ``[F, D]`` gate projection, or None when the network is not gated.
        b_gate_F: Bias of the gate projection, or None.
        b_up_F: Bias of the up projection, or None.
        b_down_D: Bias of the down projection, or None.
    """

    up_FD: Tensor
    down_DF: Tensor
    activation: str
    gate_FD: Tensor | None = None
    b_gate_F: Tensor | None = None
    b_up_F: Tensor | None = None
    b_down_D: Tensor | None = None

    def __post_init__(self) -> None:
        F, D = self.up_FD.shape
        assert self.down_DF.shape == (D, F), f"down is {tuple(self.down_DF.shape)}, expected {(D, F)}"
        if self.gate_FD is not None:
            assert self.gate_FD.shape == (F, D), f"gate is {tuple(self.gate_FD.shape)}, expected {(F, D)}"
            assert (self.b_gate_F is None) == (self.b_up_F is None), "gate and up: both or no biases"

    @property
    def width(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    @property
    def model_width(self) -> int:
        """D."""
        return self.up_FD.shape[1]


@dataclass(frozen=True)
class ExpertBank:
    """Stacked weights of a layer's experts.

    Attributes:
        w_up_EUD: ``[E, U, D]``; gate rows first, then up rows, when gated.
        w_down_EDF: ``[E, D, F]``.
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gated: True if the experts are gated.
        b_up_EU: ``[E, U]`` or None.
        b_down_ED: ``[E, D]`` or None.
    """

    w_up_EUD: Tensor
    w_down_EDF: Tensor
    activation: str
    gated: bool
    b_up_EU: Tensor | None = None
    b_down_ED: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w_up_EUD.shape[0]
