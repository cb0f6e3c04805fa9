"""What a format is: the names that a mixture's tensors have on disk, and the config beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from moe.upcycle.layer_plan import Matrix
from recipes.models.export.read_back import Unread
from recipes.models.export.spec import ModelSpec, MoESpec

#: ``per_expert``: one tensor for each matrix of each expert, as transformers 4 wrote them and everything
#: reads them; ``fused``: all experts' matrices stacked, as transformers 5 holds them in memory.
Layout = Literal["per_expert", "fused"]


class Exporter(ABC):
    """One format. Found by being in a module of `recipes.models.export`.

    Attributes:
        name: As it stands in reports.
        title: As people call it.
        models: Model types of the dense hosts that it holds; empty for any.
        is_native: Whether plain transformers loads it. A native format that fits is preferred.
        layouts: Those that its readers know.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ()
    is_native: ClassVar[bool]
    layouts: ClassVar[tuple[Layout, ...]] = ("per_expert",)

    def unsupported_reason(self, spec: ModelSpec) -> str | None:
        """Why this format cannot hold the model exactly, as a clause; None when it can."""
        if self.models and spec.config.model_type not in self.models:
            return f"{self.title} holds hosts of {', '.join(self.models)}, not of {spec.config.model_type}"
        if spec.attention and self.is_native:
            return f"{self.title} has no attention experts"
        return self.unsupported_reason_of_its_models(spec)

    @abstractmethod
    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """As `unsupported_reason`, for a host that is among `models`."""

    @abstractmethod
    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The content of ``config.json``."""

    @abstractmethod
    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """The name of one routed expert's matrix or bias."""

    @abstractmethod
    def router_name(self, moe: MoESpec, key: str) -> str:
        """The name of a tensor of the router, given its key in the router's state."""

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """The name of the shared expert's matrix or bias; called where there is one."""
        raise AssertionError(f"{self.name} has no shared expert; its refusal says so")

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """The name of the stacked matrices, ``[E, U, D]`` or ``[E, D, F]``, in the layout ``fused``."""
        raise AssertionError(f"{self.name} has no fused layout; its layouts say so")

    def factor(self, moe: MoESpec, expert: int | None, matrix: Matrix) -> float:
        """What an expert's matrix (None: the shared expert's) is multiplied by, to suit a reader's gate."""
        return 1.0

    def constants(self, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the format has and the model has not, for values that change nothing."""
        return iter(())

    def kept_name(self, name: str) -> str:
        """The name of a tensor outside the mixtures, given its name in the host."""
        return name

    def keeps_dtype(self, name: str) -> bool:
        """Whether a tensor, named as on disk, is written as it is, whatever dtype the export has."""
        return False

    def exact_in(self, spec: ModelSpec) -> list[str]:
        """The programs known to compute exactly this function from the files."""
        return ["transformers"] if self.is_native else ["graft"]

    @abstractmethod
    def open(self, folder: Path) -> Unread:
        """Opens what was exported, to be read block by block as its users would read it whole."""
