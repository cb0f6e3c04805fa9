"""The engine of plain torch: FSDP2 or DDP over torchrun, gloo on CPUs and nccl on GPUs.

One code path for 1 and N ranks: a single process makes a process group of its own.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.errors import Mistake
from moe.experts import Experts
from moe.routers import RouterConfig
from recipes.data.samples import Marks
from recipes.engines.base import Engine, EngineConfig, Trainable
from recipes.engines.expert_parallel import (
    average_gradients,
    expert_mesh,
    gathered,
    mixture_mistakes,
    rank_refusal,
    spread_experts,
)
from recipes.hosts.ffn import decoder_blocks
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.optim import OptimConfig, OptimizerSet, build_optimizer, clip_grad_norm
from recipes.rules import require


@dataclass(frozen=True)
class NativeConfig(EngineConfig):
    """Config of `NativeEngine`."""

    name: Literal["native"] = "native"
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """``fsdp``: weights, gradients and optimizer state are sharded over the ranks; ``ddp``: replicated."""
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
    compile: bool = False
    """Compile each block by torch.compile; the MoE layers stay outside of the compiled graphs."""

    def __post_init__(self) -> None:
        spreads, value = self.expert_parallel > 1, self.expert_parallel
        require(
            (
                self.threads == "auto" or self.threads >= 1,
                f"threads={self.threads} must be at least 1. Or leave it at auto.",
            ),
            (value >= 1, f"expert_parallel={value} must be at least 1. Give 1 for experts on every rank."),
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
        )

    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


class NativeEngine(Engine[NativeConfig]):
    """torch.distributed alone."""

    name = "native"
    config_class = NativeConfig

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self._mesh: DeviceMesh | None = None
        self._expert_mesh: DeviceMesh | None = None

    @classmethod
    def check(cls, config: NativeConfig) -> str | None:
        """A GPU must be there when one is asked for, and ranks for the experts."""
        if config.device == "cuda" and not torch.cuda.is_available():
            return "device='cuda': torch sees no GPU. Set engine.device=cpu, or install a CUDA build of torch"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if config.device_type() == "cuda" and local > torch.cuda.device_count():
            return (
                f"device={config.device!r}: {local} ranks on this machine and {torch.cuda.device_count()} "
                "GPUs. Start one rank for each GPU (--nproc-per-node)"
            )
        return rank_refusal(config.expert_parallel, int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def check_mixture(cls, config: NativeConfig, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """The experts must divide over the ranks that share them."""
        return mixture_mistakes(config.expert_parallel, num_experts, router)

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
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._set_threads(kind)
        self._mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("dp",))
        if self.config.expert_parallel > 1:
            self._expert_mesh = expert_mesh(kind, self.world_size, self.config.expert_parallel)

    def _set_threads(self, kind: str) -> None:
        if self.config.threads != "auto":
            torch.set_num_threads(self.config.threads)
        elif kind == "cpu":
            # torchrun sets OMP_NUM_THREADS=1 whatever the machine; each rank gets its share of the cores.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def prepare(self, host: HuggingFaceHost, optim: OptimConfig) -> NativeTrainable:
        """Wraps the model and builds its optimizer."""
        assert self._mesh is not None, "open() comes before prepare()"
        host.context.group = self.data_group
        if self.config.activation_checkpointing:
            host.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            _compile_blocks(host)
        spread: list[Experts] = []
        if self.config.strategy == "fsdp":
            if self._expert_mesh is not None:
                policy = replace(self._policy, cast_forward_inputs=False)
                spread = spread_experts(host, self._expert_mesh, policy)
            wrapped = self._shard(host, self._mesh)
        else:
            host.model.to(self.device)
            wrapped = DistributedDataParallel(host.model, forward_sync_buffers=False)
        return NativeTrainable(self, host, wrapped, optim, spread)

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        low = self.config.precision == "bf16"
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )

    def _shard(self, host: HuggingFaceHost, mesh: DeviceMesh) -> nn.Module:
        policy = self._policy
        if policy.param_dtype is not None:
            # Routers stay fp32: a group of their own that neither casts weights nor inputs.
            for layer in host.routed_layers():
                fully_shard(
                    layer.router, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
                )
        for block in decoder_blocks(host.model, host.config):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(host.model, mesh=mesh, mp_policy=policy)
        return host.model

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _compile_blocks(host: HuggingFaceHost) -> None:
    for layer in host.routed_layers():
        # Which rows go where is known on the host only: the layer runs between compiled graphs.
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    for block in decoder_blocks(host.model, host.config):
        block.compile()


class NativeTrainable(Trainable):
    """A host under FSDP2 or DDP with its optimizer."""

    def __init__(
        self,
        engine: NativeEngine,
        host: HuggingFaceHost,
        wrapped: nn.Module,
        optim: OptimConfig,
        spread: Sequence[Experts] = (),
    ) -> None:
        self.engine = engine
        self.host = host
        self.wrapped = wrapped
        self.spread = tuple(spread)
        self.optim_config = optim
        self.optimizer: OptimizerSet = build_optimizer(host.model, optim)
        self._real_BS: Tensor | None = None
        # Behind the host's own hook, which knows padding from attention masks alone.
        host.model.register_forward_pre_hook(self._tell_padding)

    def _tell_padding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._real_BS is not None:
            self.host.context.padding_mask = self._real_BS

    def forward_backward(
        self, tokens_BS1: Tensor, micro_batch: int, num_micro_batches: int, marks: Marks | None = None
    ) -> Tensor:
        """See `Trainable.forward_backward`."""
        run = self.host.context
        run.micro_batch, run.num_micro_batches = micro_batch, num_micro_batches
        run.loss_scale = 1.0 / num_micro_batches
        self.host.model.train()
        last = micro_batch == num_micro_batches - 1
        with self._gradient_sync(last):
            losses_BS = self._losses(tokens_BS1, marks)
            loss = losses_BS.mean() if marks is None else (losses_BS * marks.weights_BS.to(losses_BS)).sum()
            (loss * run.loss_scale).backward()
        if last:
            average_gradients(self.spread, self.engine.config.expert_parallel)
        return loss.detach()

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the ranks with the last micro-batch of a step."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        assert isinstance(self.wrapped, DistributedDataParallel)
        return nullcontext() if last else self.wrapped.no_sync()

    def _losses(self, tokens_BS1: Tensor, marks: Marks | None) -> Tensor:
        tokens_BS1 = tokens_BS1.to(self.engine.device)
        logits_BSV = self._forward(tokens_BS1[:, :-1], marks)
        targets_BS = tokens_BS1[:, 1:]
        losses = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
        return losses.view(targets_BS.shape)

    def _forward(self, tokens_BS: Tensor, marks: Marks | None = None) -> Tensor:
        device = self.engine.device.type
        self._real_BS = None if marks is None else marks.real_BS.to(self.engine.device)
        more = {}
        if marks is not None and marks.positions_BS is not None:
            more["position_ids"] = marks.positions_BS.to(self.engine.device)
        # Under FSDP2 the policy casts; under DDP autocast does.
        low = self.engine.config.precision == "bf16" and not isinstance(self.wrapped, FSDPModule)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            logits: Tensor = self.wrapped(input_ids=tokens_BS, use_cache=False, **more).logits
        return logits

    def step(self, lr_factor: float) -> Tensor:
        """See `Trainable.step`."""
        self.optimizer.drop_frozen(self.host.context.step)
        norm = clip_grad_norm(self.host.model.parameters(), self.optim_config.clip_norm)
        if torch.isfinite(norm):
            self.optimizer.set_lr_factor(lr_factor)
            self.optimizer.step()
            self.host.context.step += 1
            for layer in self.host.routed_layers():
                layer.router.after_optimizer_step(layer.context)
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, marks: Marks | None = None) -> Tensor:
        """See `Trainable.token_losses`."""
        self.host.model.eval()
        return self._losses(tokens_BS1, marks)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `Trainable.logits`."""
        self.host.model.eval()
        return self._forward(tokens_BS.to(self.engine.device)).float()

    def checkpoint_tensors(self) -> dict[str, Tensor]:
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
        every = {name for name, _ in self.host.model.named_parameters(remove_duplicate=False)}
        buffers = {k: v for k, v in self.host.model.state_dict().items() if k not in every}
        return tensors | buffers

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable.full_tensors`."""
        self._reshard()
        for name, tensor in self._model_tensors().items():
            yield name, gathered(tensor) if isinstance(tensor, DTensor) else tensor
