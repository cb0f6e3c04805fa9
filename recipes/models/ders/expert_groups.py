"""Groups the tensors of a checkpoint that hold the experts of one matrix, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from recipes.runtime.safetensors_codec import TensorSpec

# One tensor for each expert, or all experts of a matrix stacked.
_ONE = re.compile(r"(.*\bexperts\.)(\d+)(\..+)")
_STACKED = re.compile(r".*\bexperts\.[a-z_0-9]+")
_LEAST_AXES = 2


@dataclass(frozen=True)
class ExpertGroup:
    """Experts of one matrix.

    Attributes:
        name: Name of their tensors, with ``{}`` for the expert's number; without if one tensor stacks them.
        num_experts: Number of experts.
        shape: Shape of one expert's matrix.
        dtype: Dtype of all.
    """

    name: str
    num_experts: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stacked(self) -> bool:
        """True if one tensor holds all experts."""
        return "{}" not in self.name

    def member(self, expert: int) -> str:
        """Returns the name of the tensor that holds an expert."""
        return self.name.replace("{}", str(expert))

    def key(self, expert: int) -> str:
        """Returns a unique key of one expert's matrix."""
        return f"{self.name} {expert}"

    @property
    def stem(self) -> str:
        """Prefix of the names of the stored tensors."""
        return f"ders.{self.name.replace('{}', '_')}"


def find_groups(specs: Iterable[TensorSpec]) -> list[ExpertGroup]:
    """Finds the expert matrices among tensors; biases and single experts are not grouped."""
    members: dict[str, dict[int, TensorSpec]] = {}
    groups: list[ExpertGroup] = []
    for spec in specs:
        if match := _ONE.fullmatch(spec.name):
            members.setdefault(f"{match[1]}{{}}{match[3]}", {})[int(match[2])] = spec
        elif _STACKED.fullmatch(spec.name) and len(spec.shape) > _LEAST_AXES and spec.shape[0] > 1:
            groups.append(ExpertGroup(spec.name, spec.shape[0], spec.shape[1:], spec.dtype))
    for name, experts in members.items():
        first = experts[min(experts)]
        alike = len({(spec.shape, spec.dtype) for spec in experts.values()}) == 1
        whole = sorted(experts) == list(range(len(experts)))
        if alike and whole and len(experts) > 1 and len(first.shape) >= _LEAST_AXES:
            groups.append(ExpertGroup(name, len(experts), first.shape, first.dtype))
    return groups
