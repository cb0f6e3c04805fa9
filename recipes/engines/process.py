"""Base of the engines that run one process a device in a process group of torch.

The group is the one that torchrun describes, or one of a single process: gloo on CPUs and nccl on GPUs.
"""

from __future__ import annotations

import os
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy

from moe.errors import Mistake
from recipes.engines.base import Engine
from recipes.engines.config import NO_GPU, ProcessConfig
from recipes.engines.native.parallel_dims import ParallelDims
from recipes.engines.native.parallelize import apply_fsdp, gather_when_called
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.cpu_memory import keep_memory_low
from recipes.runtime.rendezvous import join

ProcessConfigT = TypeVar("ProcessConfigT", bound=ProcessConfig)


class ProcessEngine(Engine[ProcessConfigT], Generic[ProcessConfigT]):
    """Engine with one process a device, whose ranks see different data by default."""

    @classmethod
    def check(cls, config: ProcessConfigT) -> Mistake | None:
        """Requires the GPUs that are asked for, too."""
        if found := super().check(config):
            return found
        if config.device == "cuda" and not torch.cuda.is_available():
            return NO_GPU
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if config.device_type() == "cuda" and local > torch.cuda.device_count():
            rule = f"{local} ranks on this machine and {torch.cuda.device_count()} GPUs"
            return Mistake("device", config.device, rule, "Start one rank for each GPU (--nproc-per-node).")
        return None

    @property
    def rank(self) -> int:
        """See `Engine.rank`."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        """See `Engine.world_size`."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def device(self) -> torch.device:
        """See `Engine.device`."""
        if self.config.device_type() == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def data_group(self) -> ProcessGroup | None:
        """See `Engine.data_group`; all ranks."""
        return dist.group.WORLD

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `Engine.compute_dtype`."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def open(self) -> None:
        """Joins the process group that torchrun describes, or opens one of a single process."""
        kind = self.config.device_type()
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_memory_low()
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
            # torchrun sets OMP_NUM_THREADS=1 on every machine; each rank gets its share of the cores.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def shard_for_eval(self, model: HFModel) -> None:
        """See `Engine.shard_for_eval`; FSDP2 shards the model over all ranks."""
        assert model.weights is not None, "a model that has its memory is sharded already"
        mesh = ParallelDims(self.world_size).meshes(self.config.device_type()).weights
        apply_fsdp(model, mesh, MixedPrecisionPolicy())
        model.weights.give(model.module, self.device)
        model.weights = None
        gather_when_called(model.module)

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
