"""What engines have in common that run one process a device and let every rank see different data.

The process group is torch's: gloo on CPUs and nccl on GPUs, as torchrun describes it or of a single process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy

from moe.errors import Mistake, Rule, require
from moe.routers import RouterConfig
from recipes.engines.base import Engine, EngineConfig
from recipes.engines.native.expert_parallel import check_ranks, moe_mistakes
from recipes.engines.native.parallel_dims import ParallelDims
from recipes.engines.native.shard_for_eval import cut_blocks, gather_when_called
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.rendezvous import join


@dataclass(frozen=True)
class ProcessConfig(EngineConfig):
    """Config of a `ProcessEngine`."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products. Master weights, router and loss are fp32 in both."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: GPUs where there are any."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of each rank; ``auto``: the cores over the ranks of this machine when on CPU."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are spread; tokens travel to them. 1: every rank holds all."""

    def __post_init__(self) -> None:
        require(self, *self.rules())

    def rules(self) -> list[Rule]:
        """Returns the rules of the fields."""
        return [
            (
                self.threads == "auto" or self.threads >= 1,
                "threads",
                "must be at least 1",
                "Or leave it at auto.",
            ),
            (
                self.expert_parallel >= 1,
                "expert_parallel",
                "must be at least 1",
                "Give 1 for experts on every rank.",
            ),
        ]

    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


ProcessConfigT = TypeVar("ProcessConfigT", bound=ProcessConfig)


class ProcessEngine(Engine[ProcessConfigT], Generic[ProcessConfigT]):
    """Ranks that all see different data."""

    @classmethod
    def check(cls, config: ProcessConfigT) -> Mistake | None:
        """A GPU must be there when one is asked for, and ranks for the experts."""
        if config.device == "cuda" and not torch.cuda.is_available():
            remedy = "Set engine.device=cpu, or install a CUDA build of torch."
            return Mistake("device", config.device, "torch sees no GPU", remedy)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if config.device_type() == "cuda" and local > torch.cuda.device_count():
            rule = f"{local} ranks on this machine and {torch.cuda.device_count()} GPUs"
            return Mistake("device", config.device, rule, "Start one rank for each GPU (--nproc-per-node).")
        return cls.check_dims(config, int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def check_dims(cls, config: ProcessConfigT, world_size: int) -> Mistake | None:
        """Returns the mistake that keeps the ranks from being laid out as configured; None when they can."""
        return check_ranks(config.expert_parallel, world_size)

    @classmethod
    def check_moe(cls, config: ProcessConfigT, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """The experts must divide over the ranks that share them."""
        return moe_mistakes(config.expert_parallel, num_experts, router)

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        kind = self.config.device_type()
        return (
            torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
            if kind == "cuda"
            else torch.device(kind)
        )

    @property
    def data_group(self) -> ProcessGroup | None:
        """All ranks see different data."""
        return dist.group.WORLD

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def open(self) -> None:
        """Joins the process group that torchrun describes, or makes one of a single process."""
        kind = self.config.device_type()
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if dist.is_torchelastic_launched() or "MASTER_ADDR" in os.environ:
            join(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._set_threads(kind)

    def _set_threads(self, kind: str) -> None:
        if self.config.threads != "auto":
            torch.set_num_threads(self.config.threads)
        elif kind == "cpu":
            # torchrun sets OMP_NUM_THREADS=1 whatever the machine; each rank gets its share of the cores.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def shard_for_eval(self, model: HFModel) -> None:
        """See `Engine.shard_for_eval`: FSDP2 cuts it over all ranks, whatever the engine."""
        assert model.weights is not None, "a model that has its memory is held already"
        mesh = ParallelDims(self.world_size).weight_mesh(self.config.device_type())
        cut_blocks(model, mesh, MixedPrecisionPolicy())
        model.weights.give(model.module, self.device)
        model.weights = None
        gather_when_called(model.module)

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
