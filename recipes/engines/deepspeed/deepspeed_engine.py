"""The engine of DeepSpeed: ZeRO-0 to ZeRO-3, with expert parallelism, on CPUs and GPUs.

DeepSpeed shards gradients, optimizer state and weights over the ranks. The optimizer, its parameter groups,
clipping and checkpoints are Graft's own, so that a run trains as on the native engine.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.checkpoint import GlobalTensor, LocalShard
from recipes.checkpoint.shard_layout import place
from recipes.engines.base import EngineLayout, HeldShares, may_update
from recipes.engines.deepspeed.config import DeepSpeedConfig, make_ds_config
from recipes.engines.deepspeed.flat_partitions import (
    Partition,
    StepCounts,
    replicated_partitions,
    sharded_partitions,
    sharded_run,
    state_tensors,
)
from recipes.engines.deepspeed.zero_experts import DeepSpeedEP, apply_ep, gather_slices
from recipes.engines.hf_train_module import HFTrainModule
from recipes.engines.micro_batch import MicroBatch, batch_loss
from recipes.engines.optim.clipping import clip_parts
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import OptimizerSet, build_optimizer
from recipes.engines.process import ProcessEngine
from recipes.models.hf.deferred_init import (
    PresentWeights,
    WeightSource,
    drop_memory,
    persistent_buffers,
    stand_in,
)
from recipes.models.hf.hf_model import HFModel, empty_copy

__all__ = ["DeepSpeedConfig", "DeepSpeedEngine", "DeepSpeedTrainModule"]


class DeepSpeedEngine(ProcessEngine[DeepSpeedConfig]):
    """Engine of DeepSpeed's ZeRO."""

    name = "deepspeed"
    config_class = DeepSpeedConfig
    compared = tuple(
        EngineLayout(2, ("engine=deepspeed", f"engine.zero_stage={stage}", f"engine.expert_parallel={ep}"))
        for stage in range(4)
        for ep in (1, 2)
    )

    @classmethod
    def held_shares(cls, config: DeepSpeedConfig, world_size: int, *, accumulates: bool) -> HeldShares:
        """Shards by the stage of ZeRO; the optimizer has weights of its own, and gradients pass a bucket."""
        ep, stage = config.expert_parallel, config.zero_stage
        cut = (1 / world_size, 1 / world_size)
        held = (1.0, 1 / ep)
        copies = (2 * cut[0], 2 * cut[1]) if stage else (0.0, 0.0)
        return HeldShares(
            cut if stage == 3 else held,
            cut if stage >= 2 else held,
            cut if stage else held,
            copies=copies if stage >= 2 else (copies[0] + 1.0, copies[1] + 1 / ep),
            gathers=stage == 3,
            expert_ranks=ep,
        )

    def open(self) -> None:
        """Joins the process group, and lets DeepSpeed use it."""
        super().open()
        # DeepSpeed picks its device by itself, and would pick a GPU that the run must not use.
        os.environ["DS_ACCELERATOR"] = self.config.device_type()
        os.environ.setdefault("LOCAL_RANK", "0")
        _moe_engine().join()

    def prepare(self, model: HFModel, optim: OptimConfig) -> DeepSpeedTrainModule:
        """Shards and wraps the model, and builds its optimizer."""
        skeleton = empty_copy(model)
        weights = PresentWeights({name: p.data for name, p in model.module.named_parameters()}, model.weights)
        buffers = {name for name, _ in persistent_buffers(model.module) if name in weights.buffers}
        model.weights = None
        stand_in(model.module, self.device)
        drop_memory(model.module.parameters(), self.device)
        model.context.group = self.data_group
        if self.config.activation_checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        model.module.to(self.device)
        ep = apply_ep(model, self.config.expert_parallel)
        train_module = DeepSpeedTrainModule(self, model, skeleton, optim, ep)
        train_module.take(weights, buffers)
        return train_module

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            _moe_engine().leave()


class DeepSpeedTrainModule(HFTrainModule):
    """Model under DeepSpeed, with its optimizer."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        model: HFModel,
        skeleton: HFModel,
        optim: OptimConfig,
        ep: DeepSpeedEP,
    ) -> None:
        self.stage: int = engine.config.zero_stage
        self.ep = ep
        self.clip_norm = optim.clip_norm
        self._skeleton = skeleton
        self.optimizer: OptimizerSet = build_optimizer(model.module, optim)
        self.names = {id(param): name for name, param in model.module.named_parameters()}
        elements = sum(param.numel() for param in model.module.parameters())
        ds_config = make_ds_config(self.stage, engine.config.precision, elements)
        # DeepSpeed's own autocast applies within its forward pass.
        wrapped = _moe_engine().wrap(model, self.optimizer, ds_config, ep)
        super().__init__(engine, model, wrapped, autocast=False)
        run, optimizer = model.context, self.optimizer
        optimizer.optimizers[0].register_step_pre_hook(lambda *_: optimizer.drop_frozen(run.step))
        weakref.finalize(self, _moe_engine().release, wrapped).atexit = False
        self.partitions = self._partitions()
        self._counts = StepCounts()

    @property
    def skeleton(self) -> HFModel:
        """See `TrainModule.skeleton`."""
        return self._skeleton

    def _partitions(self) -> list[Partition]:
        if self.stage == 0:
            return []
        find = sharded_partitions if self.stage == 3 else replicated_partitions
        return find(self.wrapped.optimizer, self.names)

    def take(self, weights: WeightSource, buffers: Collection[str]) -> None:
        """Fills what this rank holds, once DeepSpeed has laid it out.

        Args:
            weights: Source of every parameter, and of some buffers.
            buffers: Names of these buffers.
        """
        local = dict(self._parameters())
        local |= {name: tensor for name, tensor in persistent_buffers(self.model.module) if name in buffers}
        weights.fill({name: place(name, value) for name, value in local.items()})

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `TrainModule.forward_backward`."""
        losses: list[Tensor] = []
        self.model.module.train()
        for number, batch in enumerate(batches):
            self._begin(number, len(batches))
            self.wrapped.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = batch_loss(self._losses(batch), batch.metadata)
            self.wrapped.backward(loss * self.model.context.loss_scale, scale_wrt_gas=False)
            losses.append(loss.detach())
        return losses

    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """See `TrainModule.step`."""
        self._counts.take()
        norm = clip_parts(self._gradients(), self.clip_norm, self.engine.device)
        if may_update(float(norm), norm_limit):
            self.optimizer.set_lr_factor(lr_factor)
            self.wrapped.step()
            self._after_update()
        else:
            _moe_engine().discard_gradients(self.wrapped, self.stage)
        return norm

    def _gradients(self) -> list[tuple[list[Tensor], list[dist.ProcessGroup]]]:
        """Returns this rank's gradients, with the groups whose ranks hold the other parts of them."""
        frozen = self.optimizer.frozen
        hidden = frozen.groups if self.model.context.step < frozen.steps else ()
        if self.stage == 0:
            self.optimizer.drop_frozen(self.model.context.step)
            named = [
                (self.names[id(p)], p.grad) for p in self.model.module.parameters() if p.grad is not None
            ]
            whole = [grad for name, grad in named if name not in self.ep.counts]
            sharded = [grad for name, grad in named if name in self.ep.counts]
            return [(whole, []), (sharded, [] if self.ep.group is None else [self.ep.group])]
        found = []
        for i, partition in enumerate(self.partitions):
            if partition.group["name"] in hidden:
                continue
            grads = self.wrapped.optimizer.averaged_gradients[i]
            if self.stage == 3:
                # The padding behind a parameter's last element was never written.
                grads = [grad[: run.length] for grad, run in zip(grads, partition.runs, strict=True)]
            found += grads
        assert dist.group.WORLD is not None
        return [(found, [dist.group.WORLD])]

    def checkpoint_tensors(self) -> dict[str, GlobalTensor]:
        """See `TrainModule.checkpoint_tensors`."""
        self._counts.forget()
        weights = [*self._parameters(), *persistent_buffers(self.model.module)]
        tensors = {f"model.{name}": tensor for name, tensor in weights}
        if self.stage == 0:
            state = self.optimizer.state_tensors(self.model.module.named_parameters())
            return tensors | {key: self._slice(_owner(key), value) for key, value in state.items()}
        inner = self.optimizer.optimizers[0]
        return tensors | state_tensors(inner, self.partitions, self.ep, self._counts)

    def _parameters(self) -> Iterator[tuple[str, GlobalTensor]]:
        for name, param in self.model.module.named_parameters():
            if self.stage == 3:
                part: Any = param
                yield name, sharded_run(part, name).shard(part.ds_tensor.data, self.ep)
            else:
                yield name, self._slice(name, param.data)

    def _slice(self, name: str, tensor: Tensor) -> GlobalTensor:
        if name not in self.ep.counts or tensor.ndim == 0:
            return tensor
        shape, row = self.ep.place(name, tuple(tensor.shape))
        return LocalShard(tensor, shape, (row, *[0] * (len(shape) - 1)))

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainModule.full_tensors`."""
        if self.stage == 3:
            _moe_engine().let_go(self.wrapped)
        for name, param in self.model.module.named_parameters():
            whole = self._whole(param)
            yield name, gather_slices(whole, self.ep) if name in self.ep.counts else whole
        yield from persistent_buffers(self.model.module)

    def _whole(self, param: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return param.data
        with _moe_engine().gathered(param):
            return param.data.clone()


def _moe_engine() -> Any:
    """Imports DeepSpeed, which takes seconds."""
    from recipes.engines.deepspeed import moe_engine

    return moe_engine


def _owner(key: str) -> str:
    """Returns the name of the parameter that a tensor of the optimizer's state belongs to."""
    return key.removeprefix("optim.").rpartition(".")[0]
