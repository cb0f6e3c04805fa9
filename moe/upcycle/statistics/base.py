"""Contract of the statistics of a layer's activations: accumulators of tensors, without files or hooks.

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
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws


def hidden_of(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    """Computes ``[T, F]``, the input of a dense network's down projection."""
    act = ACTIVATIONS[ffn.activation]
    up_TF = linear(x_TD, ffn.up_FD.to(x_TD.dtype), _as(ffn.b_up_F, x_TD))
    if ffn.gate_FD is None:
        return act.forward(up_TF)
    return act.hidden(linear(x_TD, ffn.gate_FD.to(x_TD.dtype), _as(ffn.b_gate_F, x_TD)), up_TF)


def _as(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


@dataclass(frozen=True)
class LayerBatch:
    """Input and gradient of one layer's dense network in a batch.

    Attributes:
        ffn: Weights of the network.
        x_TD: Its input.
        index_T: int64 number of every token in the calibration text, independent of batches and ranks.
        grad_out_TD: Gradient of the summed loss with respect to its output; None if not asked for.
        mask_T: True for real tokens; None if all are.
    """

    ffn: FFNWeights
    x_TD: Tensor
    index_T: Tensor
    grad_out_TD: Tensor | None = None
    mask_T: Tensor | None = None

    @cached_property
    def hidden_TF(self) -> Tensor:
        """Input of the down projection."""
        return hidden_of(self.ffn, self.x_TD)

    @cached_property
    def grad_hidden_TF(self) -> Tensor:
        """Gradient of the summed loss with respect to `hidden_TF`."""
        assert self.grad_out_TD is not None, "no gradient was asked for"
        return self.grad_out_TD @ self.ffn.down_DF.to(self.grad_out_TD.dtype)

    def real(self) -> LayerBatch:
        """Returns the batch without padding."""
        if self.mask_T is None:
            return self
        keep_T = self.mask_T
        grad_TD = None if self.grad_out_TD is None else self.grad_out_TD[keep_T]
        return LayerBatch(self.ffn, self.x_TD[keep_T], self.index_T[keep_T], grad_TD)


class Statistic(ABC):
    """Statistic of one layer, found in any module of `moe.upcycle.statistics`.

    Its `sums` simply add over batches and ranks; a statistic with another state overrides `state`, `load` and
    `merged`.

    Attributes:
        name: Name by which methods ask for it; it ends in the letters of the result's axes.
        after: Statistics whose results it needs, gathered in an earlier pass over the text.
        reads_text: True if it needs a pass; else it follows from `after` and the weights.
        needs_gradient: True if it needs the gradient of the loss.
        defaults: Options with their defaults.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        """Starts without data.

        Args:
            ffn: The weights of the dense network.
            options: Options that differ from `defaults`.
            earlier: Results of `after`.
            draws: The layer's randomness, the only source of it.
        """
        unknown = options.keys() - self.defaults.keys()
        assert not unknown, f"{self.name} has no options {sorted(unknown)}"
        self.ffn = ffn
        self.options = {**self.defaults, **options}
        self.earlier = earlier
        self.draws = draws
        self.sums: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Creates the empty sums."""
        return

    def zeros_per_token(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """Returns empty sums of a quantity and of the tokens behind each of its rows."""
        device = self.ffn.up_FD.device
        return {
            name: torch.zeros(shape, dtype=dtype, device=device),
            "tokens": torch.zeros(shape[:-1], dtype=torch.int64, device=device),
        }

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Returns the memory that it takes for one layer, with complete options."""
        return 8 * shape.width

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch of real tokens."""
        raise AssertionError(f"{self.name} reads no text")

    def state(self) -> dict[str, Tensor]:
        """Returns the present state."""
        return dict(self.sums)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a result of `state` or `merged`."""
        assert state.keys() == self.sums.keys(), (sorted(state), sorted(self.sums))
        self.sums = {name: value.to(self.sums[name]) for name, value in state.items()}

    def merged(self, group: ProcessGroup | None) -> dict[str, Tensor]:
        """Returns the joint state of all ranks of a group; this rank's own is unchanged. Collective."""
        if group is None:
            return self.state()
        merged = {}
        for name, value in self.sums.items():
            merged[name] = value.clone()
            torch.distributed.all_reduce(merged[name], group=group)
        return merged

    @abstractmethod
    def result(self) -> Tensor:
        """Returns the statistic, on the CPU."""

    def merge(self, group: ProcessGroup | None) -> Self:
        """Adopts the joint state of all ranks. Collective."""
        self.load(self.merged(group))
        return self
