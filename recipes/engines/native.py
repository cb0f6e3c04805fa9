"""The engine of plain torch: FSDP2 or DDP over torchrun, gloo on CPUs and nccl on GPUs.

One code path for 1 and N ranks: a single process makes a process group of its own.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe.experts import Experts
from recipes.checkpoint import GlobalTensor
from recipes.data.samples import Marks
from recipes.engines.base import may_update
from recipes.engines.expert_parallel import (
    average_gradients,
    cut_by_rows,
    expert_mesh,
    gathered,
    spread_experts,
)
from recipes.engines.host_trainable import HostTrainable
from recipes.engines.layout import EngineLayout
from recipes.engines.process import ProcessConfig, ProcessEngine
from recipes.hosts.ffn import decoder_blocks
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.metrics import Metric, reduce_metrics
from recipes.optim import OptimConfig, OptimizerSet, build_optimizer, clip_grad_norm


@dataclass(frozen=True)
class NativeConfig(ProcessConfig):
    """Config of `NativeEngine`."""

    name: Literal["native"] = "native"
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """``fsdp``: weights, gradients and optimizer state are sharded over the ranks; ``ddp``: replicated."""
    compile: bool = False
    """Compile each block by torch.compile; the MoE layers stay outside of the compiled graphs."""

    def rules(self) -> list[tuple[bool, str]]:
        """What must hold, and what to say where it does not."""
        spreads, value = self.expert_parallel > 1, self.expert_parallel
        return [
            *super().rules(),
            (
                not (spreads and self.strategy == "ddp"),
                f"expert_parallel={value} must be 1 under strategy=ddp, which keeps all weights on every "
                "rank. Set engine.strategy=fsdp.",
            ),
            (
                not (spreads and self.compile),
                f"expert_parallel={value} must be 1 with compile: the two together are not proven. "
                "Set engine.compile=false.",
            ),
        ]


class NativeEngine(ProcessEngine[NativeConfig]):
    """torch.distributed alone."""

    name = "native"
    config_class = NativeConfig
    fills_shards = True
    compared = (
        EngineLayout(1, ("engine=native",)),
        EngineLayout(2, ("engine=native",)),
        EngineLayout(2, ("engine=native", "engine.strategy=ddp")),
        EngineLayout(2, ("engine=native", "engine.expert_parallel=2")),
    )

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self._mesh: DeviceMesh | None = None
        self._expert_mesh: DeviceMesh | None = None

    def open(self) -> None:
        """Joins the process group, and lays the ranks out."""
        super().open()
        kind = self.config.device_type()
        self._mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("dp",))
        if self.config.expert_parallel > 1:
            self._expert_mesh = expert_mesh(kind, self.world_size, self.config.expert_parallel)

    def prepare(self, host: HuggingFaceHost, optim: OptimConfig) -> NativeTrainable:
        """Wraps the model and builds its optimizer."""
        host.context.group = self.data_group
        if self.config.activation_checkpointing:
            host.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            _compile_blocks(host)
        spread = self._spread(host, self._policy)
        wrapped: nn.Module = host.model
        if self.config.strategy == "ddp":
            wrapped = DistributedDataParallel(host.model, forward_sync_buffers=False)
        return NativeTrainable(self, host, wrapped, optim, spread)

    def hold(self, host: HuggingFaceHost) -> None:
        """See `Engine.hold`."""
        self._spread(host, MixedPrecisionPolicy())
        for module in host.model.modules():
            if isinstance(module, FSDPModule):
                # Asked for by name, what has been gathered is let go at once, and not with the next layer's.
                module.register_forward_pre_hook(lambda module, args: module.unshard(), prepend=True)

    def _spread(self, host: HuggingFaceHost, policy: MixedPrecisionPolicy) -> list[Experts]:
        """Leaves each rank its part of the model, and fills it; returns experts that are apart."""
        assert self._mesh is not None, "open() comes first"
        spread: list[Experts] = []
        if self.config.strategy == "fsdp":
            if self._expert_mesh is not None:
                own = replace(policy, cast_forward_inputs=False)
                spread = spread_experts(host, self._expert_mesh, own)
            self._shard(host, self._mesh, policy)
        if host.weights is not None:
            host.weights.give(host.model, self.device)
            host.weights = None
        if self.config.strategy == "ddp":
            host.model.to(self.device)
        return spread

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        low = self.config.precision == "bf16"
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )

    def _shard(self, host: HuggingFaceHost, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        if policy.param_dtype is not None:
            # Routers stay fp32: a group of their own that neither casts weights nor inputs.
            for layer in host.routed_layers():
                fully_shard(
                    layer.router, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
                )
        rows = cut_by_rows(host, mesh.size())
        for block in decoder_blocks(host.model, host.config):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=policy,
                shard_placement_fn=lambda parameter: Shard(1) if parameter in rows else Shard(0),
            )
        fully_shard(host.model, mesh=mesh, mp_policy=policy)


def _compile_blocks(host: HuggingFaceHost) -> None:
    for layer in host.routed_layers():
        # Which rows go where is known on the host only: the layer runs between compiled graphs.
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    for block in decoder_blocks(host.model, host.config):
        block.compile()


class NativeTrainable(HostTrainable):
    """A host under FSDP2 or DDP with its optimizer."""

    def __init__(
        self,
        engine: NativeEngine,
        host: HuggingFaceHost,
        wrapped: nn.Module,
        optim: OptimConfig,
        spread: Sequence[Experts] = (),
    ) -> None:
        super().__init__(engine, host)
        self.config = engine.config
        self.wrapped = wrapped
        self.spread = tuple(spread)
        self.optim_config = optim
        self.optimizer: OptimizerSet = build_optimizer(host.model, optim)

    def forward_backward(
        self, tokens_BS1: Tensor, micro_batch: int, num_micro_batches: int, marks: Marks | None = None
    ) -> Tensor:
        """See `Trainable.forward_backward`."""
        self._begin(micro_batch, num_micro_batches)
        last = micro_batch == num_micro_batches - 1
        with self._gradient_sync(last):
            loss = self._loss(tokens_BS1, marks)
            (loss * self.host.context.loss_scale).backward()
        if last:
            average_gradients(self.spread, self.config.expert_parallel)
        return loss.detach()

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the ranks with the last micro-batch of a step."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        assert isinstance(self.wrapped, DistributedDataParallel)
        return nullcontext() if last else self.wrapped.no_sync()

    def _call(self, **inputs: Any) -> Tensor:
        # Under FSDP2 the policy casts; under DDP autocast does.
        low = self.config.precision == "bf16" and not isinstance(self.wrapped, FSDPModule)
        with torch.autocast(self.engine.device.type, dtype=torch.bfloat16, enabled=low):
            logits: Tensor = self.wrapped(**inputs).logits
        return logits

    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """See `Trainable.step`."""
        self.optimizer.drop_frozen(self.host.context.step)
        norm = clip_grad_norm(self.host.model.parameters(), self.optim_config.clip_norm)
        if isinstance(self.wrapped, DistributedDataParallel):
            # Taken by every rank of its own copy: were one of them damaged, the others would go on alone.
            norm = reduce_metrics({"norm": Metric(norm, "mean")}, self.engine.data_group)["norm"]
        if may_update(float(norm), norm_limit):
            self.optimizer.set_lr_factor(lr_factor)
            self.optimizer.step()
            self._after_update()
        self.optimizer.zero_grad()
        return torch.as_tensor(norm)

    def checkpoint_tensors(self) -> dict[str, GlobalTensor]:
        """See `Trainable.checkpoint_tensors`."""
        self._reshard()
        tensors = {f"model.{name}": tensor for name, tensor in self._model_tensors().items()}
        return tensors | self.optimizer.state_tensors(self.host.model.named_parameters())

    def _reshard(self) -> None:
        """After a forward pass without backward FSDP2 leaves its outermost weights gathered."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _model_tensors(self) -> dict[str, Tensor]:
        """Parameters, tied ones once, and the buffers that are part of the state."""
        tensors: dict[str, Tensor] = {name: p.data for name, p in self.host.model.named_parameters()}
        return tensors | self._buffers()

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable.full_tensors`."""
        self._reshard()
        for name, tensor in self._model_tensors().items():
            yield name, gathered(tensor) if isinstance(tensor, DTensor) else tensor
