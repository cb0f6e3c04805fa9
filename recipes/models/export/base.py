"""Export format: names of an MoE model's tensors on disk, and the config beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from recipes.runtime.safetensors_codec import TensorSpec

if TYPE_CHECKING:
    import torch

    from moe.upcycle.layer_plan import Matrix
    from recipes.models.export.read_back import Unread
    from recipes.models.export.spec import ModelSpec, MoESpec

#: ``per_expert``: one tensor for each matrix of each expert, as transformers 4 wrote them and everything
#: reads them; ``fused``: all experts' matrices stacked, as in transformers 5.
Layout = Literal["per_expert", "fused"]


class Exporter(ABC):
    """Export format. It is found by being defined in a module of `recipes.models.export`.

    Attributes:
        name: Name in reports.
        title: Name in messages.
        models: Types of dense models that it can hold; empty for any.
        is_native: Whether plain transformers loads it. A native format that fits is preferred.
        layouts: Layouts that its readers know.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ()
    is_native: ClassVar[bool]
    layouts: ClassVar[tuple[Layout, ...]] = ("per_expert",)

    def unsupported_reason(self, spec: ModelSpec) -> str | None:
        """Returns a clause on why this format cannot hold the model exactly; None if it can."""
        if self.is_native and getattr(spec.config, "auto_map", None):
            return f"{self.title} is a class of transformers, and the model is computed by code of its own"
        if self.models and spec.read.model_type not in self.models:
            return f"{self.title} holds models of {', '.join(self.models)}, not of {spec.read.model_type}"
        if spec.attention and self.is_native:
            return f"{self.title} has no attention experts"
        return self.unsupported_reason_of_its_models(spec)

    @abstractmethod
    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Does the same for a model whose type is among `models`."""

    @abstractmethod
    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the content of ``config.json``."""

    @abstractmethod
    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """Returns the name of one routed expert's matrix or bias."""

    @abstractmethod
    def router_name(self, moe: MoESpec, key: str) -> str | None:
        """Returns the name of a router's tensor, given its key in the router's state.

        None for a tensor that stays as it is in this format's models, and is not written.
        """

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """Returns the name of the shared expert's matrix or bias; called only if there is one."""
        raise AssertionError(f"{self.name} has no shared expert; its unsupported_reason says so")

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """Returns the name of the stacked matrices, ``[E, U, D]`` or ``[E, D, F]``, in layout ``fused``."""
        raise AssertionError(f"{self.name} has no fused layout; its layouts say so")

    def factor(self, moe: MoESpec, expert: int | None, matrix: Matrix) -> float:
        """Returns the factor that a reader's gate requires for an expert matrix (None: the shared expert)."""
        return 1.0

    def constants(self, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors that the format requires and the model lacks, with values that change nothing."""
        return iter(())

    def kept_name(self, name: str) -> str:
        """Returns the name on disk of a tensor outside the MoE layers, given its name in the model."""
        return name

    def second_names(self, name: str) -> tuple[str, ...]:
        """Returns further names on disk under which a tensor outside the MoE layers, named so, is written."""
        return ()

    def keeps_dtype(self, name: str) -> bool:
        """Returns True for a tensor, named as on disk, that keeps its dtype in exports of any dtype."""
        return False

    def written(self, tensor: TensorSpec, wanted: torch.dtype | None) -> TensorSpec:
        """Returns a tensor, named as on disk, as it stands in an export.

        Args:
            tensor: Its name, and dtype and shape in the model.
            wanted: Dtype of floating-point tensors; None leaves each as it is.
        """
        if wanted is None or not tensor.dtype.is_floating_point or self.keeps_dtype(tensor.name):
            return tensor
        return replace(tensor, dtype=wanted)

    def written_config(self, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the content of ``config.json`` with the dtype of the weights.

        The dtype stands also under the name that transformers before 4.56 reads.
        """
        return self.config(spec) | dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))

    def exact_in(self, spec: ModelSpec, layout: Layout = "per_expert") -> list[str]:
        """Lists the programs that compute exactly this function from the files, as tests certify."""
        return ["graft"]

    @abstractmethod
    def open(self, folder: Path, *, trust_remote_code: bool = False) -> Unread:
        """Opens an export, to be read block by block with its users' loader."""
