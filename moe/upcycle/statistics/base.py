"""What every statistic of a layer's activations is: an accumulator of tensors, without files or hooks.

Letters: T tokens, D model width, F width of the dense network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from kernels.activations import ACTIVATIONS
from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws, FFNShape


def hidden_of(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    """``[T, F]``: what the down projection of a dense network reads."""
    act = ACTIVATIONS[ffn.activation]
    up_TF = linear(x_TD, ffn.up_FD.to(x_TD.dtype), _as(ffn.b_up_F, x_TD))
    if ffn.gate_FD is None:
        return act.forward(up_TF)
    return act.hidden(linear(x_TD, ffn.gate_FD.to(x_TD.dtype), _as(ffn.b_gate_F, x_TD)), up_TF)


def _as(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


@dataclass(frozen=True)
class LayerBatch:
    """What one layer's dense network saw and did, for real tokens alone.

    Attributes:
        ffn: Its weights.
        x_TD: Its input.
        index_T: int64, the number of every token in the calibration text: it tells tokens apart whatever
            the batches and ranks are.
        grad_out_TD: Gradient of the summed loss with respect to its output; None where none was asked for.
        mask_T: True for real tokens; None when all are.
    """

    ffn: FFNWeights
    x_TD: Tensor
    index_T: Tensor
    grad_out_TD: Tensor | None = None
    mask_T: Tensor | None = None

    @cached_property
    def hidden_TF(self) -> Tensor:
        """What the down projection reads."""
        return hidden_of(self.ffn, self.x_TD)

    @cached_property
    def grad_hidden_TF(self) -> Tensor:
        """Gradient of the summed loss with respect to `hidden_TF`."""
        assert self.grad_out_TD is not None, "no gradient was asked for"
        return self.grad_out_TD @ self.ffn.down_DF.to(self.grad_out_TD.dtype)

    def real(self) -> LayerBatch:
        """Without padding."""
        if self.mask_T is None:
            return self
        keep_T = self.mask_T
        grad_TD = None if self.grad_out_TD is None else self.grad_out_TD[keep_T]
        return LayerBatch(self.ffn, self.x_TD[keep_T], self.index_T[keep_T], grad_TD)


class Statistic(ABC):
    """One statistic of one layer. Found by being in a module of `moe.upcycle.statistics`.

    What it sums up is in `sums`, which simply add over batches and ranks; a statistic that keeps something
    else overrides `state`, `load` and `merged`.

    Attributes:
        name: What methods ask for it by; it ends in the letters of the axes of the result.
        after: Statistics whose results it needs: those are gathered in an earlier pass over the text.
        reads_text: Whether it needs a pass; else it follows from `after` and the weights.
        needs_gradient: Whether it needs the gradient of the loss.
        defaults: Its options.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        """Starts at nothing.

        Args:
            ffn: The weights of the dense network.
            options: Those that differ from `defaults`.
            earlier: The results of `after`.
            draws: Of the layer; randomness comes from it alone.
        """
        unknown = options.keys() - self.defaults.keys()
        assert not unknown, f"{self.name} has no options {sorted(unknown)}"
        self.ffn = ffn
        self.options = {**self.defaults, **options}
        self.earlier = earlier
        self.draws = draws
        self.sums: dict[str, Tensor] = {}

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Memory of what it keeps of one layer, for options that are complete."""
        return 8 * shape.width

    def update(self, batch: LayerBatch) -> None:
        """Takes in a batch of real tokens."""
        raise AssertionError(f"{self.name} reads no text")

    def state(self) -> dict[str, Tensor]:
        """What it has so far."""
        return dict(self.sums)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` or `merged` gave."""
        assert state.keys() == self.sums.keys(), (sorted(state), sorted(self.sums))
        self.sums = {name: value.to(self.sums[name]) for name, value in state.items()}

    def merged(self, group: ProcessGroup | None) -> dict[str, Tensor]:
        """The state of all ranks of a group together; this rank's own stays as it is. Collective."""
        if group is None:
            return self.state()
        merged = {}
        for name, value in self.sums.items():
            merged[name] = value.clone()
            torch.distributed.all_reduce(merged[name], group=group)
        return merged

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic, on the CPU."""

    def merge(self, group: ProcessGroup | None) -> Self:
        """Takes over the state of all ranks. Collective."""
        self.load(self.merged(group))
        return self
