"""Base of formats of quantised weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.runtime.safetensors_codec import TensorSpec


class PackedError(ValueError):
    """Files do not fit their format; the message is a clause about them."""


@dataclass(frozen=True)
class Unpacked:
    """Plain tensor, and what it is made of.

    Attributes:
        name: Its name, as transformers' class has it.
        shape: Its shape.
        parts: Names of the tensors in the files that hold it.
        unpack: Makes it, in fp32, of these tensors, in their order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    unpack: Callable[[Sequence[Tensor]], Tensor]


class PackedFormat(ABC):
    """Format of quantised weights.

    Attributes:
        name: Value of ``quant_method`` in ``quantization_config``.
        summary: What it is, for people.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def unpacked(self, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Iterator[Unpacked]:
        """Finds the tensors that are packed.

        Args:
            tensors: All tensors of the files.
            config: Content of ``quantization_config``.

        Raises:
            PackedError: Tensors lack what they need, or their shapes contradict one another.
        """

    def left_out(self, tensors: Mapping[str, TensorSpec]) -> set[str]:
        """Returns tensors that plain weights do not need, such as scales of activations."""
        return set()
