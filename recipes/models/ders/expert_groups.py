"""Which tensors of a checkpoint are experts of one matrix, by their global names."""

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
    """The experts of one matrix.

    Attributes:
        name: Theirs, with ``{}`` for the expert's number; without, where they are stacked in one tensor.
        num_experts: How many.
        shape: Of one of them.
        dtype: Of all.
    """

    name: str
    num_experts: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all."""
        return "{}" not in self.name

    def member(self, expert: int) -> str:
        """The tensor that one expert is in."""
        return self.name.replace("{}", str(expert))

    def key(self, expert: int) -> str:
        """Names one expert's matrix."""
        return f"{self.name} {expert}"

    @property
    def stem(self) -> str:
        """Begins the names of what is stored of it."""
        return f"ders.{self.name.replace('{}', '_')}"


def find_groups(specs: Iterable[TensorSpec]) -> list[ExpertGroup]:
    """The matrices of experts among tensors; biases and single experts stay what they are."""
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
