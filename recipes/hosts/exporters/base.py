"""What writes a trained model in a format that others read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from recipes.hosts.huggingface import HuggingFaceHost


class Exporter(ABC):
    """One format. Found by being in a module of `recipes.hosts.exporters`.

    Attributes:
        name: As it stands in reports.
        is_native: Whether plain transformers loads it. A native format that fits is preferred.
    """

    name: ClassVar[str]
    is_native: ClassVar[bool]

    @abstractmethod
    def refusal(self, host: HuggingFaceHost) -> str | None:
        """Why this format cannot hold the host exactly, as a clause; None when it can."""

    @abstractmethod
    def config(self, host: HuggingFaceHost) -> dict[str, Any]:
        """The content of ``config.json``."""

    @abstractmethod
    def rename(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The names and tensors that one of the host's tensors is written as."""

    def keeps_dtype(self, name: str) -> bool:
        """Whether a tensor of the host is written as it is, whatever dtype the export has."""
        return False

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Loads what was exported, as its users would, for the comparison of logits."""
