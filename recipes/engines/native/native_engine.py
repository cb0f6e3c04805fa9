"""The engine of plain torch: FSDP2 or DDP over torchrun, with gloo on CPUs and nccl on GPUs.

The code path is the same for 1 and N ranks: a single process opens a process group of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.errors import Mistake
from recipes.checkpoint import GlobalTensor
from recipes.engines.base import EngineLayout, HeldShares, may_update
from recipes.engines.hf_train_module import HFTrainModule, model_tensors
from recipes.engines.micro_batch import MicroBatch, batch_loss
from recipes.engines.native.config import NativeConfig
from recipes.engines.native.expert_parallel import gathered
from recipes.engines.native.parallel_dims import Meshes, ParallelDims
from recipes.engines.native.parallelize import GradientSync, gather_when_called, parallelize
from recipes.engines.native.tensor_parallel import attention_mistakes
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import OptimizerSet, build_optimizer, clip_grad_norm
from recipes.engines.process import ProcessEngine
from recipes.engines.run_options import RunOptions, model_config
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel
from recipes.tracking.metrics_log import Metric, reduce_metrics

__all__ = ["NativeConfig", "NativeEngine", "NativeTrainModule"]


class NativeEngine(ProcessEngine[NativeConfig]):
    """Engine that needs torch.distributed alone."""

    name = "native"
    config_class = NativeConfig
    trains_as_sharded = True
    compared = (
        EngineLayout(1, ("engine=native",)),
        EngineLayout(2, ("engine=native",)),
        EngineLayout(2, ("engine=native", "engine.strategy=ddp")),
        EngineLayout(2, ("engine=native", "engine.expert_parallel=2")),
        EngineLayout(2, ("engine=native", "engine.replicas=2")),
        EngineLayout(2, ("engine=native", "engine.tensor_parallel=2")),
    )

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self._meshes: Meshes | None = None
        self._sample_group: ProcessGroup | None = None

    @classmethod
    def held_shares(cls, config: NativeConfig, world_size: int, *, accumulates: bool) -> HeldShares:
        """Shards all by FSDP2, but gradients that wait for the last micro-batch; DDP has buckets too."""
        if config.strategy == "ddp":
            whole = (1.0, 1.0)
            return HeldShares(whole, whole, whole, copies=whole)
        share = 1 / _dims(config, world_size).group
        each, ep = (share, share), config.expert_parallel
        waiting = (1.0, 1 / ep) if accumulates and share < 1 else (0.0, 0.0)
        return HeldShares(each, each, each, copies=waiting, gathers=True, expert_ranks=ep)

    @classmethod
    def check_run(cls, config: NativeConfig, run: RunOptions) -> list[Mistake]:
        """Requires a family whose attention transformers can shard under tensor parallelism, too."""
        if (found := super().check_run(config, run)) or config.tensor_parallel == 1:
            return found
        dense = model_config(run)
        return [] if dense is None else attention_mistakes(dense, config.tensor_parallel)

    def open(self) -> None:
        """Joins the process group and builds the device meshes."""
        super().open()
        self._meshes = _dims(self.config, self.world_size).meshes(self.config.device_type())
        attention = self._meshes.attention
        # Routers that assign the tokens of all ranks must see each token once.
        self._sample_group = self.data_group if attention is None else attention.sample_group()

    def prepare(self, model: HFModel, optim: OptimConfig) -> NativeTrainModule:
        """Shards or replicates the model and builds its optimizer."""
        model.context.group = self._sample_group
        if self.config.activation_checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            _compile_blocks(model)
        low = self.config.precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )
        sync = self._place(model, policy)
        wrapped: nn.Module = model.module
        if self.config.strategy == "ddp":
            wrapped = DistributedDataParallel(model.module, forward_sync_buffers=False)
        return NativeTrainModule(self, model, wrapped, optim, sync)

    def shard_for_eval(self, model: HFModel) -> None:
        """See `Engine.shard_for_eval`."""
        self._place(model, MixedPrecisionPolicy())
        gather_when_called(model.module)

    def _place(self, model: HFModel, policy: MixedPrecisionPolicy) -> GradientSync:
        """Shards the model as configured, and fills what this rank holds of it."""
        assert self._meshes is not None, "open() comes first"
        sharded = self.config.strategy == "fsdp"
        sync = parallelize(model, self._meshes, policy) if sharded else GradientSync()
        if model.weights is not None:
            model.weights.give(model.module, self.device)
            model.weights = None
        if not sharded:
            model.module.to(self.device)
        return sync


def _dims(config: NativeConfig, world_size: int) -> ParallelDims:
    return ParallelDims(world_size, config.replicas, config.expert_parallel, config.tensor_parallel)


def _compile_blocks(model: HFModel) -> None:
    for layer in model.routed_layers():
        # The numbers of rows of the experts are known on the CPU only: the layer runs between graphs.
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    for block in decoder_blocks(model.module, model.config):
        block.compile()


class NativeTrainModule(HFTrainModule):
    """Model under FSDP2 or DDP, with its optimizer."""

    def __init__(
        self,
        engine: NativeEngine,
        model: HFModel,
        wrapped: nn.Module,
        optim: OptimConfig,
        sync: GradientSync,
    ) -> None:
        # Under FSDP2 the policy casts.
        low = engine.config.precision == "bf16" and not isinstance(wrapped, FSDPModule)
        super().__init__(engine, model, wrapped, autocast=low)
        self.config = engine.config
        self.sync = sync
        self.optim_config = optim
        self.optimizer: OptimizerSet = build_optimizer(model.module, optim)

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `TrainModule.forward_backward`."""
        losses: list[Tensor] = []
        self.model.module.train()
        self.sync.begin_step(self.engine.device)
        for number, batch in enumerate(batches):
            self._begin(number, len(batches))
            with self._reduces(last=number == len(batches) - 1):
                loss = batch_loss(self._losses(batch), batch.metadata)
                (loss * self.model.context.loss_scale).backward()
            losses.append(loss.detach())
        self.sync.finish_step()
        return losses

    def _reduces(self, *, last: bool) -> AbstractContextManager[Any]:
        """Averages gradients over the ranks in the last micro-batch of a step alone."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        assert isinstance(self.wrapped, DistributedDataParallel)
        return nullcontext() if last else self.wrapped.no_sync()

    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """See `TrainModule.step`."""
        self.optimizer.drop_frozen(self.model.context.step)
        norm = clip_grad_norm(self.model.module.parameters(), self.optim_config.clip_norm)
        if isinstance(self.wrapped, DistributedDataParallel) or self.config.replicas > 1:
            # Each replica computes its own norm: if one were damaged, the others would go on without it.
            norm = reduce_metrics({"norm": Metric(norm, "mean")}, self.engine.data_group)["norm"]
        if may_update(float(norm), norm_limit):
            self.optimizer.set_lr_factor(lr_factor)
            self.optimizer.step()
            self._after_update()
        self.optimizer.zero_grad()
        return torch.as_tensor(norm)

    def checkpoint_tensors(self) -> dict[str, GlobalTensor]:
        """See `TrainModule.checkpoint_tensors`."""
        self._reshard()
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        return tensors | self.optimizer.state_tensors(self.model.module.named_parameters())

    def _reshard(self) -> None:
        """Frees the outermost weights, which FSDP2 leaves gathered after a forward pass without backward."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainModule.full_tensors`."""
        self._reshard()
        for name, tensor in model_tensors(self.model).items():
            yield name, gathered(tensor) if isinstance(tensor, DTensor) else tensor
