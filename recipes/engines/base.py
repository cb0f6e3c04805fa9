"""What every engine is: it holds the process group, and makes models trainable.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.errors import Mistake
from moe.routers import RouterConfig
from moe.types import Config
from recipes.data.samples import Marks
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.optim import OptimConfig


@dataclass(frozen=True)
class EngineConfig(Config):
    """What every engine's config holds: its name, which picks the class."""

    name: str
    """The engine's name, as in ``conf/engine/NAME.yaml``."""


ConfigT = TypeVar("ConfigT", bound=EngineConfig)


class Trainable(ABC):
    """A model that an engine has made trainable."""

    host: HuggingFaceHost

    @abstractmethod
    def forward_backward(
        self, tokens_BS1: Tensor, micro_batch: int, num_micro_batches: int, marks: Marks | None = None
    ) -> Tensor:
        """Adds a micro-batch's share of the step's gradients.

        Args:
            tokens_BS1: ``[B, S + 1]`` ids; the last S are the targets of the first S.
            micro_batch: Index within the step.
            num_micro_batches: Micro-batches of the step.
            marks: What is known of the tokens; their weights are such that the mean over ranks and
                micro-batches of the weighted sums is the step's loss. None: all tokens count alike.

        Returns:
            The weighted sum, or the mean, of the losses of this rank's tokens, detached; without balance
            losses.
        """

    @abstractmethod
    def step(self, lr_factor: float) -> Tensor:
        """Clips, updates and clears the gradients; returns their norm over all ranks before clipping.

        The caller checks the norm: nothing is updated when it is not finite.
        """

    @abstractmethod
    def token_losses(self, tokens_BS1: Tensor, marks: Marks | None = None) -> Tensor:
        """``[B, S]`` cross-entropy of each target, unweighted, in evaluation mode and without gradients."""

    @abstractmethod
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """``[B, S, V]`` logits in evaluation mode, without gradients."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Live model and optimizer tensors under global names, to save or to load in place."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model in full, under the host's names. All ranks must exhaust it together."""


class Engine(ABC, Generic[ConfigT]):
    """The process group of a run and how models are spread over it.

    A subclass sets `name` and `config_class` and is found by being a module of `recipes.engines`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[EngineConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @classmethod
    def check(cls, config: ConfigT) -> str | None:
        """Why this machine cannot run the engine as configured, as "field=value: rule. Remedy."."""
        return None

    @classmethod
    def check_mixture(cls, config: ConfigT, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Why the engine as configured cannot train a mixture of so many experts under this router."""
        return []

    @property
    @abstractmethod
    def rank(self) -> int:
        """Of this process."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def first_on_machine(self) -> bool:
        """Whether this is the rank that reads what all ranks of a machine share; as launchers number them."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    @abstractmethod
    def data_group(self) -> ProcessGroup | None:
        """The ranks that see different data."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """The dtype that matrix products run in."""

    @abstractmethod
    def open(self) -> None:
        """Joins the process group."""

    @abstractmethod
    def prepare(self, host: HuggingFaceHost, optim: OptimConfig) -> Trainable:
        """Spreads a model over the ranks and gives it an optimizer."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the process group."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        if torch.distributed.is_initialized() and self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if torch.distributed.is_initialized() and self.world_size > 1:
            torch.distributed.barrier()
