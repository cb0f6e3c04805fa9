"""Interfaces of the engines, which hold the process group of a run and prepare models for training.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from recipes.engines.config import EngineConfig

if TYPE_CHECKING:
    from moe.errors import Mistake
    from recipes.checkpoint import GlobalTensor
    from recipes.data.samples import TokenMetadata
    from recipes.engines.micro_batch import MicroBatch
    from recipes.engines.optim.config import OptimConfig
    from recipes.engines.run_options import RunOptions
    from recipes.models.hf.hf_model import HFModel


ConfigT = TypeVar("ConfigT", bound=EngineConfig)


def may_update(norm: float, norm_limit: float) -> bool:
    """Returns whether gradients of this norm may update the model: it is finite and within the limit."""
    return math.isfinite(norm) and norm <= norm_limit


@dataclass(frozen=True)
class EngineLayout:
    """Example of how an engine is run.

    Attributes:
        ranks: Number of processes.
        options: Command-line options that pick the engine and lay out its ranks.
    """

    ranks: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layout in words, also used as the name of a folder."""
        options = [option.removeprefix("engine.").removeprefix("engine=") for option in self.options]
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'}, {', '.join(options)}"


@dataclass(frozen=True)
class HeldShares:
    """Shares of a model's elements that a rank holds in training: outside and inside the routed experts.

    Attributes:
        weights: Of the fp32 weights.
        gradients: Of their gradients.
        optimizer: Of the optimizer's state.
        copies: Of further copies that the engine keeps of trained weights or gradients.
        gathers: Whether layers are gathered to be computed.
        expert_ranks: Ranks over which the experts of a gathered layer stay sharded.
    """

    weights: tuple[float, float]
    gradients: tuple[float, float]
    optimizer: tuple[float, float]
    copies: tuple[float, float] = (0.0, 0.0)
    gathers: bool = False
    expert_ranks: int = 1

    def of(self, shares: tuple[float, float], elements: tuple[int, int]) -> float:
        """Returns the elements that shares of elements outside and inside the experts are."""
        return shares[0] * elements[0] + shares[1] * elements[1]


class TrainModule(ABC):
    """Model that an engine has prepared for training."""

    model: HFModel

    @property
    def skeleton(self) -> HFModel:
        """The model before it was sharded: names, shapes and settings. Its tensors may be empty."""
        return self.model

    @abstractmethod
    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Adds up the gradients of a step. Collective.

        Args:
            batches: The micro-batches of the step, all of one shape. They are taken in order, each when its
                forward pass is due, so that they may be read on demand.

        Returns:
            The `batch_loss` of each micro-batch on this rank, detached and without balance losses. Ranks that
            see the same samples return the same.
        """

    @abstractmethod
    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """Clips the gradients, updates the weights and clears the gradients.

        If `may_update` rejects the norm, no rank updates anything: weights, optimizer state and routers stay.
        The caller applies `may_update` to the returned norm to learn what happened.

        Args:
            lr_factor: Share of the full learning rate.
            norm_limit: Largest norm that may update. A negative limit forbids the update and only clears the
                gradients.

        Returns:
            The norm of the gradients over all ranks, before clipping.
        """

    @abstractmethod
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """Returns the ``[B, S]`` unweighted losses of the targets, in evaluation mode, without gradients."""

    @abstractmethod
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Returns the ``[B, S, V]`` logits in evaluation mode, without gradients."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, GlobalTensor]:
        """Returns the live tensors of model and optimizer by global name, to save or to load in place."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the model in full, by its name. All ranks must exhaust it together."""


class Engine(ABC, Generic[ConfigT]):
    """Process group of a run, and the way in which models are sharded over it.

    A subclass sets `name` and `config_class`, and is found by being a module of `recipes.engines`.

    Attributes:
        trains_as_sharded: Whether `prepare` shards a model as `shard_for_eval` does, so that a model sharded
            for evaluation can be trained without moving its weights.
        compared: Layouts in which ``python -m tools.compare_engines`` runs it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[EngineConfig]]
    trains_as_sharded: ClassVar[bool] = False
    compared: ClassVar[tuple[EngineLayout, ...]] = ()

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @classmethod
    def check(cls, config: ConfigT) -> Mistake | None:
        """Returns the mistake that keeps this machine from running the engine; None if it can.

        The path is relative to the engine's config, whose own check comes first.
        """
        return config.check(int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def check_run(cls, config: ConfigT, run: RunOptions) -> list[Mistake]:
        """Returns the reasons why the engine cannot run with the other options, its config's first."""
        return config.check_run(run)

    @classmethod
    def held_shares(cls, config: ConfigT, world_size: int, *, accumulates: bool) -> HeldShares:
        """Returns the shares of a model that a rank holds in training; by default all of it.

        Args:
            config: The engine's options.
            world_size: Number of ranks.
            accumulates: Whether a step has several micro-batches.
        """
        return HeldShares((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))

    @property
    def data_rank(self) -> int:
        """Index of this process, or of its group of model-parallel ranks, among the `data_ranks`."""
        return self.rank // self.config.model_parallel_size

    @property
    def data_ranks(self) -> int:
        """Number of ranks, or of groups of model-parallel ranks, that see samples of their own."""
        return self.world_size // self.config.model_parallel_size

    def describe(self) -> str | None:
        """Returns a line on the engine's variant for the start of a run, or None if there is only one."""
        return None

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of this process."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of this rank."""

    @property
    def first_on_machine(self) -> bool:
        """True on the first rank of each machine, which reads what its ranks share."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    @abstractmethod
    def data_group(self) -> ProcessGroup | None:
        """Ranks that see different data."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products."""

    @abstractmethod
    def open(self) -> None:
        """Joins the process group."""

    @abstractmethod
    def prepare(self, model: HFModel, optim: OptimConfig) -> TrainModule:
        """Shards a model over the ranks and builds its optimizer.

        Args:
            model: Changed in place. Parameters without memory are filled from `model.weights`, on each rank
                with its part; other parameters must be equal on all ranks.
            optim: Settings of the optimizer.
        """

    @abstractmethod
    def shard_for_eval(self, model: HFModel) -> None:
        """Shards a model over the ranks for forward passes in fp32 without training. Collective.

        Args:
            model: Without memory yet. Changed in place. Its forward passes are then collective, too.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves the process group."""

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        box = [value]
        if torch.distributed.is_initialized() and self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if torch.distributed.is_initialized() and self.world_size > 1:
            torch.distributed.barrier()
