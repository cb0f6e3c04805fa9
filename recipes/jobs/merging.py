"""Tensors of a checkpoint with low-rank factors merged into their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moe.experts.lora import merged
from recipes.checkpoint.reader import CheckpointTensors
from recipes.models.hf.state_dict_map import StateDictMap
from recipes.models.lora_model import Factors, is_factor
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.convert.dense_stage import MODEL_PREFIX


@dataclass(frozen=True)
class Merging:
    """Model in a checkpoint, whose low-rank factors are merged into their weights as these are read.

    Attributes:
        tensors: Tensors of the checkpoint.
        factors: Low-rank factors by the names of their weights.
    """

    tensors: CheckpointTensors
    factors: Mapping[str, Factors]

    def names(self) -> list[str]:
        """Returns the names of the model's tensors, without the factors."""
        return [name for name in self.tensors.names(MODEL_PREFIX) if not is_factor(name)]

    def kept(self, live: StateDictMap) -> list[TensorSpec]:
        """Lists the tensors that belong to no MoE layer."""
        return [
            TensorSpec(name, self.tensors.dtype(MODEL_PREFIX + name), self.tensors.shape(MODEL_PREFIX + name))
            for name in self.names()
            if live.pieces(name) is None and live.router(name) is None
        ]

    def read(self, name: str) -> Tensor:
        """Reads a tensor of the model."""
        tensor = self.tensors.read(MODEL_PREFIX + name)
        if name not in self.factors:
            return tensor
        pair = self.factors[name]
        a_ErI, b_EOr = (self.tensors.read(MODEL_PREFIX + part) for part in (pair.a, pair.b))
        return merged(tensor, a_ErI, b_EOr, pair.scale)
