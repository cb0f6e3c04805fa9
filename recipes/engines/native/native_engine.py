"""The engine of plain torch: FSDP2 or DDP over torchrun, gloo on CPUs and nccl on GPUs.

One code path for 1 and N ranks: a single process makes a process group of its own.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.errors import Mistake, Rule
from moe.experts.experts import Experts
from recipes.checkpoint import GlobalTensor
from recipes.data.samples import TokenMetadata
from recipes.engines.base import may_update
from recipes.engines.example_layouts import EngineLayout
from recipes.engines.hf_train_module import HFTrainModule
from recipes.engines.native.expert_parallel import (
    ExpertMeshes,
    apply_ep,
    average_gradients,
    gathered,
)
from recipes.engines.native.parallel_dims import ParallelDims
from recipes.engines.native.shard_for_eval import cut_blocks, gather_when_called
from recipes.engines.native.tensor_parallel import (
    AttentionMeshes,
    add_partial_gradients,
    attention_mistakes,
    cut_attention,
    share_random_state,
    share_tokens,
)
from recipes.engines.optim.optimizer import OptimConfig, OptimizerSet, build_optimizer, clip_grad_norm
from recipes.engines.process import ProcessConfig, ProcessEngine
from recipes.engines.run_options import RunOptions
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.inspection import check_dense, read_config
from recipes.tracking.metrics_log import Metric, reduce_metrics


@dataclass(frozen=True)
class NativeConfig(ProcessConfig):
    """Config of `NativeEngine`."""

    name: Literal["native"] = "native"
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """``fsdp``: weights, gradients and optimizer state are sharded over the ranks; ``ddp``: replicated."""
    replicas: int = 1
    """Groups of ranks, each of which holds the whole model between its ranks (HSDP): weights are gathered
    within a group, and gradients averaged between groups. 1: one group of all ranks."""
    tensor_parallel: int = 1
    """Ranks over which the heads of attention are spread. They see the same samples; each has the experts
    compute its share of the tokens. 1: every rank computes all heads."""
    compile: bool = False
    """Compile each block by torch.compile; the MoE layers stay outside of the compiled graphs."""

    def rules(self) -> list[Rule]:
        """Returns the rules of the fields."""
        cuts = {name: getattr(self, name) for name in ("replicas", "expert_parallel", "tensor_parallel")}
        return [
            *super().rules(),
            (self.replicas >= 1, "replicas", "must be at least 1", "Give 1 for one group of ranks."),
            (
                self.tensor_parallel >= 1,
                "tensor_parallel",
                "must be at least 1",
                "Give 1 for whole attention.",
            ),
            *(
                (
                    value <= 1 or self.strategy != "ddp",
                    name,
                    "must be 1 under strategy=ddp, which keeps all weights on every rank",
                    "Set engine.strategy=fsdp.",
                )
                for name, value in cuts.items()
            ),
            *(
                (
                    value <= 1 or not self.compile,
                    name,
                    "must be 1 with compile: the two together are not proven",
                    "Set engine.compile=false.",
                )
                for name, value in cuts.items()
            ),
        ]


class NativeEngine(ProcessEngine[NativeConfig]):
    """torch.distributed alone."""

    name = "native"
    config_class = NativeConfig
    trains_as_held = True
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
        self._mesh: DeviceMesh | None = None
        self._expert_meshes: ExpertMeshes | None = None
        self._attention_meshes: AttentionMeshes | None = None
        self._samples: ProcessGroup | None = None

    @classmethod
    def model_parallel_size(cls, config: NativeConfig) -> int:
        """Ranks that hold the heads of attention between them see the same samples."""
        return config.tensor_parallel

    @classmethod
    def check_dims(cls, config: NativeConfig, world_size: int) -> Mistake | None:
        """See `ProcessEngine.check_dims`."""
        return _dims(config, world_size).check()

    @classmethod
    def check_run(cls, config: NativeConfig, run: RunOptions) -> list[Mistake]:
        """The heads of attention must divide over the ranks, where they are spread."""
        ways = config.tensor_parallel
        if ways == 1:
            return []
        if run.attention is not None:
            rule = "heads that are experts are not spread over ranks"
            return [Mistake("engine.tensor_parallel", ways, rule, "Set 1, or attention=none.")]
        if run.dense is None:
            heads = {
                "num_attention_heads": run.model.num_heads,
                "num_key_value_heads": run.model.num_kv_heads,
            }
            return attention_mistakes({"model_type": "llama", **heads}, ways)
        if check_dense(run.dense, trust_remote_code=run.trust_remote_code):
            return []  # told by others
        return attention_mistakes(read_config(Path(run.dense).expanduser()), ways)

    def open(self) -> None:
        """Joins the process group, and lays the ranks out."""
        super().open()
        dims, kind = _dims(self.config, self.world_size), self.config.device_type()
        self._mesh = dims.weight_mesh(kind)
        self._expert_meshes = dims.expert_meshes(kind)
        self._attention_meshes = dims.attention_meshes(kind)
        # Routers that assign the tokens of all ranks must not see one twice.
        self._samples = (
            self.data_group if self._attention_meshes is None else self._attention_meshes.samples()
        )

    def prepare(self, model: HFModel, optim: OptimConfig) -> NativeTrainModule:
        """Wraps the model and builds its optimizer."""
        model.context.group = self._samples
        if self.config.activation_checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            _compile_blocks(model)
        parts = self._spread(model, self._policy)
        wrapped: nn.Module = model.module
        if self.config.strategy == "ddp":
            wrapped = DistributedDataParallel(model.module, forward_sync_buffers=False)
        return NativeTrainModule(self, model, wrapped, optim, parts)

    def shard_for_eval(self, model: HFModel) -> None:
        """See `Engine.shard_for_eval`."""
        self._spread(model, MixedPrecisionPolicy())
        gather_when_called(model.module)

    def _spread(self, model: HFModel, policy: MixedPrecisionPolicy) -> Parts:
        """Leaves each rank its part of the model, and fills it."""
        assert self._mesh is not None, "open() comes first"
        parts = Parts(self.config)
        if self.config.strategy == "fsdp":
            own = replace(policy, cast_forward_inputs=False)
            if self._expert_meshes is not None:
                parts.experts = apply_ep(model, self._expert_meshes, own)
            if self._attention_meshes is not None:
                ranks = self._attention_meshes.ranks
                parts.partial = cut_attention(model, self._attention_meshes, policy)
                spread = None if self._expert_meshes is None else self._expert_meshes.ranks
                parts.partial += share_tokens(model, ranks, spread)
                parts.model_parallel_size = ranks.get_group()
            self._shard(model, self._mesh, policy)
        if model.weights is not None:
            model.weights.give(model.module, self.device)
            model.weights = None
        if self.config.strategy == "ddp":
            model.module.to(self.device)
        return parts

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        low = self.config.precision == "bf16"
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )

    def _shard(self, model: HFModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        if policy.param_dtype is not None:
            # Routers stay fp32: a group of their own that neither casts weights nor inputs.
            for layer in model.routed_layers():
                fully_shard(
                    layer.router, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
                )
        cut_blocks(model, mesh, policy)


def _dims(config: NativeConfig, world_size: int) -> ParallelDims:
    return ParallelDims(world_size, config.replicas, config.expert_parallel, config.tensor_parallel)


@dataclass
class Parts:
    """What of a model is not cut as everything else, and how its gradients become means of all samples.

    Attributes:
        config: Of the engine.
        experts: That are spread over ranks.
        partial: Modules of whose gradients each rank that sees the same samples has computed a part.
        model_parallel_size: The ranks that see the same samples; None where no other does.
    """

    config: NativeConfig
    experts: list[Experts] = field(default_factory=list)
    partial: list[nn.Module] = field(default_factory=list)
    model_parallel_size: ProcessGroup | None = None

    def begin_step(self, device: torch.device) -> None:
        """Lets ranks that see the same samples draw the same noise."""
        if self.model_parallel_size is not None:
            share_random_state(device, self.model_parallel_size)

    def finish_gradients(self) -> None:
        """Makes of what FSDP2 has left the gradients of the mean over all samples."""
        average_gradients(self.experts, self.config.expert_parallel)
        add_partial_gradients(self.partial, self.config.tensor_parallel)


def _compile_blocks(model: HFModel) -> None:
    for layer in model.routed_layers():
        # Which rows go where is known on the host only: the layer runs between compiled graphs.
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    for block in decoder_blocks(model.module, model.config):
        block.compile()


class NativeTrainModule(HFTrainModule):
    """A host under FSDP2 or DDP with its optimizer."""

    def __init__(
        self,
        engine: NativeEngine,
        model: HFModel,
        wrapped: nn.Module,
        optim: OptimConfig,
        parts: Parts,
    ) -> None:
        super().__init__(engine, model)
        self.config = engine.config
        self.wrapped = wrapped
        self.parts = parts
        self.optim_config = optim
        self.optimizer: OptimizerSet = build_optimizer(model.module, optim)

    def micro_batch_backward(
        self,
        tokens_BS1: Tensor,
        micro_batch: int,
        num_micro_batches: int,
        metadata: TokenMetadata | None = None,
    ) -> Tensor:
        """See `HFTrainModule.micro_batch_backward`."""
        self._begin(micro_batch, num_micro_batches)
        if micro_batch == 0:
            self.parts.begin_step(self.engine.device)
        last = micro_batch == num_micro_batches - 1
        with self._gradient_sync(last):
            loss = self._loss(tokens_BS1, metadata)
            (loss * self.model.context.loss_scale).backward()
        if last:
            self.parts.finish_gradients()
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
        """See `TrainModule.step`."""
        self.optimizer.drop_frozen(self.model.context.step)
        norm = clip_grad_norm(self.model.module.parameters(), self.optim_config.clip_norm)
        if isinstance(self.wrapped, DistributedDataParallel) or self.config.replicas > 1:
            # Taken of each copy by itself: were one of them damaged, the others would go on alone.
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
        tensors = {f"model.{name}": tensor for name, tensor in self._model_tensors().items()}
        return tensors | self.optimizer.state_tensors(self.model.module.named_parameters())

    def _reshard(self) -> None:
        """After a forward pass without backward FSDP2 leaves its outermost weights gathered."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _model_tensors(self) -> dict[str, Tensor]:
        """Parameters, tied ones once, and the buffers that are part of the state."""
        tensors: dict[str, Tensor] = {name: p.data for name, p in self.model.module.named_parameters()}
        return tensors | self._buffers()

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainModule.full_tensors`."""
        self._reshard()
        for name, tensor in self._model_tensors().items():
            yield name, gathered(tensor) if isinstance(tensor, DTensor) else tensor
