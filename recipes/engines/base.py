"""What every engine is: it holds the process group, and makes models trainable.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
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
from recipes.checkpoint import GlobalTensor
from recipes.data.samples import TokenMetadata
from recipes.engines.example_layouts import EngineLayout
from recipes.engines.optim.optimizer import OptimConfig
from recipes.engines.run_options import RunOptions
from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class EngineConfig(Config):
    """What every engine's config holds: its name, which picks the class."""

    name: str
    """The engine's name, as in ``conf/engine/NAME.yaml``."""


ConfigT = TypeVar("ConfigT", bound=EngineConfig)


def may_update(norm: float, norm_limit: float) -> bool:
    """Whether gradients of this norm may update anything: it is finite and within the limit."""
    return math.isfinite(norm) and norm <= norm_limit


@dataclass(frozen=True)
class MicroBatch:
    """What a rank sees in one forward pass.

    Attributes:
        tokens_BS1: ``[B, S + 1]`` ids; the last S are the targets of the first S.
        metadata: What is known of the tokens; their weights are such that the mean over ranks and
            micro-batches of the weighted sums is the step's loss. None: all tokens count alike.
    """

    tokens_BS1: Tensor
    metadata: TokenMetadata | None = None


class TrainModule(ABC):
    """A model that an engine has made trainable."""

    model: HFModel

    @property
    def skeleton(self) -> HFModel:
        """The model as it was before it was spread: names, shapes and settings. Its tensors may be empty."""
        return self.model

    @abstractmethod
    def forward_backward(self, micro_batches: Iterator[MicroBatch], count: int) -> list[Tensor]:
        """Adds up the gradients of a step. Collective.

        Args:
            micro_batches: All of the step, of one shape; each is taken when its forward pass is due.
            count: How many there are.

        Returns:
            Of each micro-batch the weighted sum, or the mean, of the losses of this rank's tokens, detached;
            without balance losses. Ranks that see the same samples return the same.
        """

    @abstractmethod
    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """Clips, updates and clears the gradients; returns their norm over all ranks before clipping.

        Nothing is updated, on any rank, unless `may_update` the norm: neither weights nor optimizer state nor
        routers. The caller asks the same question of what is returned.

        Args:
            lr_factor: Of the full learning rate.
            norm_limit: The largest norm that may update. A negative one forbids the update whatever the norm:
                the gradients of the step are then only cleared.
        """

    @abstractmethod
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """``[B, S]`` cross-entropy of each target, unweighted, in evaluation mode and without gradients."""

    @abstractmethod
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """``[B, S, V]`` logits in evaluation mode, without gradients."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, GlobalTensor]:
        """Live model and optimizer tensors under global names, to save or to load in place."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model in full, under the host's names. All ranks must exhaust it together."""


class Engine(ABC, Generic[ConfigT]):
    """The process group of a run and how models are spread over it.

    A subclass sets `name` and `config_class` and is found by being a module of `recipes.engines`.

    Attributes:
        trains_as_held: Whether `prepare` spreads a model over the ranks as `shard_for_eval` does, so that
            what is held can be trained as it lies.
        compared: Layouts in which ``python -m tools.compare_engines`` runs it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[EngineConfig]]
    trains_as_held: ClassVar[bool] = False
    compared: ClassVar[tuple[EngineLayout, ...]] = ()

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @classmethod
    def check(cls, config: ConfigT) -> Mistake | None:
        """Returns the mistake that keeps this machine from running the engine; None when it can.

        The path is relative to the engine's config.
        """
        return None

    @classmethod
    def check_moe(cls, config: ConfigT, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Why the engine as configured cannot train a mixture of so many experts under this router."""
        return []

    @classmethod
    def check_optimizer(cls, config: ConfigT, optim: OptimConfig) -> list[Mistake]:
        """Why the engine as configured cannot train with this optimizer."""
        return []

    @classmethod
    def check_run(cls, config: ConfigT, run: RunOptions) -> list[Mistake]:
        """Why the engine as configured cannot do the rest of what a run is told."""
        return []

    @classmethod
    def model_parallel_size(cls, config: ConfigT) -> int:
        """How many ranks see the same samples: neighbours, where `data_rank` does not say otherwise."""
        return 1

    @property
    def data_rank(self) -> int:
        """Which of the `data_ranks` this process is, or is a part of."""
        return self.rank // self.model_parallel_size(self.config)

    @property
    def data_ranks(self) -> int:
        """How many see samples of their own."""
        return self.world_size // self.model_parallel_size(self.config)

    def describe(self) -> str | None:
        """Which of several ways it goes, for a line at the start of a run; None where there is one."""
        return None

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
    def prepare(self, model: HFModel, optim: OptimConfig) -> TrainModule:
        """Spreads a model over the ranks and gives it an optimizer.

        Args:
            model: Changed in place. Of parameters that have no memory yet, `model.weights` fills what each
                rank holds; others hold the same on all ranks.
            optim: The optimizer's settings.
        """

    @abstractmethod
    def shard_for_eval(self, model: HFModel) -> None:
        """Spreads a model over the ranks for passes in fp32 that train nothing.

        Args:
            model: Without memory yet. Changed in place; called by all ranks together, and then its model,
                too.
        """

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
