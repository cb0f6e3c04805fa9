"""Train module of the Megatron engine, and how it is built from a transformers model.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.checkpoint import LocalBlocks
from recipes.data.samples import TokenMetadata, begins_document
from recipes.engines.base import TrainModule, may_update
from recipes.engines.hf_train_module import model_tensors
from recipes.engines.megatron.build_settings import BuildSettings
from recipes.engines.megatron.gpt_model import build_gpt, keep_padding
from recipes.engines.megatron.gpt_shape import blocks_of_stages, read_shape
from recipes.engines.megatron.hf_weights import (
    LocalParameter,
    LocalTensor,
    allocate,
    empty_model,
    gathered,
    live_tensors,
    local_parameters,
    mark_parameters,
    placed,
    shard_experts,
)
from recipes.engines.megatron.megatron_optimizer import (
    Rule,
    build_adamw,
    copy_masters,
    drop_gradients,
    master_tensors,
    rule_of,
    rules_of,
    state_tensors,
)
from recipes.engines.megatron.pipeline import from_last_stage, run_schedule, share_statistics
from recipes.engines.megatron.position_losses import losses_by_position
from recipes.engines.megatron.rank_groups import MegatronDims, RankGroups
from recipes.engines.micro_batch import MicroBatch, batch_loss
from recipes.engines.optim.config import OptimConfig
from recipes.models.hf.deferred_init import PresentWeights, WeightSource, drop_memory, stand_in
from recipes.models.hf.hf_model import HFModel, empty_copy


class MegatronTrainModule(TrainModule):
    """Pipeline stage of this rank under Megatron's data parallelism, with its optimizer.

    Attributes:
        model: Names, routers and their context; its other weights are freed.
        chunk: The stage of the GPT model, wrapped.
        optimizer: Megatron's optimizer.
    """

    def __init__(
        self,
        model: HFModel,
        skeleton: HFModel,
        chunk: Any,
        optimizer: Any,
        rules: Mapping[str, Rule],
        optim: OptimConfig,
        dims: MegatronDims,
        groups: RankGroups,
        settings: BuildSettings,
    ) -> None:
        self.model = model
        self._skeleton = skeleton
        self.chunk = chunk
        self.optimizer = optimizer
        self.optim_config = optim
        self.dims = dims
        self.groups = groups
        self.settings = settings
        self.device = settings.device
        self._shape = read_shape(model.config.to_dict())
        self._blocks_here = blocks_of_stages(self._shape.layers, dims.pp)[groups.stage]
        self._may_be_stale = False
        trained = [each for each in self.local if each.tensor.requires_grad]
        self._frozen = [x.tensor for x in trained if rule_of(x, rules).group in optim.frozen.groups]

    @property
    def skeleton(self) -> HFModel:
        """See `TrainModule.skeleton`."""
        return self._skeleton

    @property
    def local(self) -> list[LocalParameter]:
        """This rank's parameters and buffers."""
        return local_parameters(self.chunk.module, self.settings.experts, self.model, self.groups, self.dims)

    def forward_backward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `TrainModule.forward_backward`."""
        count = len(batches)
        numbers = iter(range(count))
        self.model.context.num_micro_batches, self.model.context.loss_scale = count, 1.0 / count

        def forward(left: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(left)
            fill_context = partial(self._fill_context, batch, next(numbers))
            out = self._forward(batch, fill_context)
            if out.requires_grad:
                # By then later micro-batches have been through the routers, which recomputation runs again.
                out.register_hook(lambda _: fill_context())
            return out, partial(_loss, batch.metadata)

        self.chunk.train()
        self._refresh()
        found = run_schedule(self.chunk, forward, batches, trains=True)
        share_statistics([layer.stats for _, layer in self.model.moe_layers()], self.groups, self.device)
        return list(from_last_stage(found, (count,), self.groups, self.device))

    def _forward(
        self, batch: MicroBatch, fill_context: Callable[[], None], *, logits: bool = False
    ) -> Tensor:
        """Returns this stage's output for a batch: hidden states, losses of the targets, or logits."""
        tokens_BS1 = batch.tokens_BS1.to(self.device)
        window, length = self._shape.window, tokens_BS1.shape[1] - 1
        assert window is None or length <= window, f"{length} tokens, and attention looks back {window}"
        fill_context()
        ranks = self.dims.tp if self.dims.sequence_parallel else 1
        with nullcontext() if logits else losses_by_position(self.chunk.module, ranks):
            out: Tensor = self.chunk(
                tokens_BS1[:, :-1],
                None,
                _attention_mask(batch.metadata, self.device),
                labels=None if logits else tokens_BS1[:, 1:].contiguous(),
                runtime_gather_output=logits,
            )
        # With sequence parallelism the output is strided, and only contiguous tensors can be sent.
        return out.contiguous()

    def _refresh(self) -> None:
        """Copies the master weights into the parameters if they may have been changed from outside."""
        if self._may_be_stale:
            copy_masters(self.optimizer, self.chunk)
            self._may_be_stale = False

    def _fill_context(self, batch: MicroBatch, micro_batch: int) -> None:
        """Tells the routers of a batch, as the hook of a transformers model does."""
        run, metadata = self.model.context, batch.metadata
        run.micro_batch = micro_batch
        if self.model.schedule is not None:
            run.top_k = self.model.schedule.at(run.step)
        run.token_ids = batch.tokens_BS1[:, :-1].to(self.device)
        real_BS = None if metadata is None else metadata.real_BS
        run.padding_mask = None if real_BS is None else real_BS.to(self.device)

    @torch.no_grad()
    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """See `TrainModule.step`."""
        self.optimizer.prepare_grads()
        if self.model.context.step < self.optim_config.frozen.steps:
            drop_gradients(self.optimizer, self._frozen)
        norm = float(self.optimizer.get_grad_norm())
        if may_update(norm, norm_limit):
            self._clip(norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["max_lr"] * lr_factor
            self.optimizer.step_with_ready_grads()
            self.model.context.step += 1
            for index, layer in self.model.moe_layers():
                if index in self._blocks_here:
                    layer.router.after_optimizer_step(layer.context)
        self.optimizer.zero_grad()
        self.chunk.zero_grad_buffer()
        return torch.tensor(norm)

    def _clip(self, norm: float) -> None:
        limit = self.optim_config.clip_norm
        factor = 1.0 if limit is None else limit / (norm + 1e-6)
        groups = self.optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        # All that a rank updates may be frozen.
        if factor < 1.0 and grads:
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """See `TrainModule.token_losses`."""
        shape = (tokens_BS1.shape[0], tokens_BS1.shape[1] - 1)
        return self._evaluate(MicroBatch(tokens_BS1, metadata), shape)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `TrainModule.logits`."""
        samples, length = tokens_BS.shape
        # Sequences are sharded evenly; tokens behind a position do not change it. There are no targets.
        spare = -length % (self.dims.tp if self.dims.sequence_parallel else 1)
        batch = MicroBatch(F.pad(tokens_BS, (0, spare + 1)))
        shape = (samples, length + spare, self._shape.vocabulary)
        return self._evaluate(batch, shape, logits=True)[:, :length]

    def _evaluate(self, batch: MicroBatch, shape: tuple[int, ...], *, logits: bool = False) -> Tensor:
        """Returns the last stage's output for a batch, on all stages."""

        def forward(left: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            one = next(left)
            out = self._forward(one, partial(self._fill_context, one, 0), logits=logits)
            return out, lambda out, non_loss_data: out

        self.chunk.eval()
        self._refresh()
        found = run_schedule(self.chunk, forward, [batch], trains=False)
        return from_last_stage(found, (1, *shape), self.groups, self.device)[0]

    def checkpoint_tensors(self) -> dict[str, Any]:
        """See `TrainModule.checkpoint_tensors`."""
        # The caller may write into them.
        self._may_be_stale = self._keeps_masters
        live = {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        tensors = {name: LocalBlocks(own.shape, own.shards) for name, own in live.items() if own.shards}
        return tensors | state_tensors(self.optimizer, self.local)

    @property
    def _keeps_masters(self) -> bool:
        return any(each.tensor.dtype == torch.bfloat16 for each in self.local)

    def _tensors(self) -> dict[str, LocalTensor]:
        """Returns the weights by name: fp32 master weights where there are any, else the parameters."""
        local = self.local
        low = [x for x in local if x.tensor.dtype == torch.bfloat16 and x.tensor.requires_grad]
        mastered = {id(each) for each in low}
        live = [each for each in local if id(each) not in mastered]
        return live_tensors(live) | master_tensors(self.optimizer, low)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainModule.full_tensors`."""
        names = list(model_tensors(self.skeleton))
        return gathered(self._tensors(), self.groups, names, self.device)

    @torch.no_grad()
    def take(self, weights: WeightSource) -> None:
        """Fills the weights that are trained, in fp32 whatever dtype the model computes in.

        Args:
            weights: Source of every tensor of the model, by name.
        """
        weights.fill(placed(self._tensors()))
        self._may_be_stale = self._keeps_masters


def _loss(metadata: TokenMetadata | None, losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of a micro-batch, which the schedule divides in place, and a copy to report."""
    loss = batch_loss(losses_BS, metadata)
    return loss, loss.detach().clone()


def _attention_mask(metadata: TokenMetadata | None, device: torch.device) -> Tensor | None:
    """Returns the ``[B, 1, S, S]`` mask, True where a position is hidden from another; None is causal.

    Rotary embeddings depend on distances alone, so that positions need not restart with a document. Where no
    row has a boundary attention keeps its causal path.
    """
    if metadata is None or metadata.positions_BS is None:
        return None
    begins_BS = begins_document(metadata.positions_BS)
    if not begins_BS[:, 1:].any():
        return None
    number_BS = begins_BS.to(device).cumsum(1)
    same_BSS = number_BS[:, :, None] == number_BS[:, None, :]
    return ~same_BSS.tril()[:, None]


def prepare(
    model: HFModel, optim: OptimConfig, dims: MegatronDims, groups: RankGroups, settings: BuildSettings
) -> MegatronTrainModule:
    """Builds the GPT model of a transformers model, fills it, and builds its optimizer. Collective.

    Args:
        model: Afterwards only its names, routers and statistics are left.
        optim: Settings of AdamW.
        dims: Layout of the ranks.
        groups: Groups of this rank.
        settings: Settings of the model.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    skeleton = empty_copy(model)
    weights = PresentWeights(model_tensors(model), model.weights)
    model.weights = None
    stand_in(model.module, settings.device)
    rules = rules_of(model, optim)
    blocks = blocks_of_stages(read_shape(model.config.to_dict()).layers, dims.pp)[groups.stage]
    own = [layer for index, layer in model.moe_layers() if index in blocks]
    for _, layer in model.moe_layers():
        layer.experts.ranks = dims.ep
        # An expert is read once for the tokens of all of these ranks, or of their peers in the stage.
        layer.stats.readers = groups.ep_group if dims.ep > 1 else None
    for layer in own:
        layer.router.to(settings.device)
        if layer.shared is not None:
            allocate(layer.shared, settings.device, settings.dtype)
        if settings.experts.keeps_ours:
            shard_experts(layer, groups, dims, settings.device, settings.dtype)
    gpt = build_gpt(model, dims, groups, settings)
    local = local_parameters(gpt, settings.experts, model, groups, dims)
    mark_parameters(local, dims)
    keep_padding(gpt, model, dims, groups)
    empty_model(model, [each.tensor for each in local])
    if settings.distributed:
        # The distributed optimizer moves what it updates into one buffer.
        drop_memory((p for p in gpt.parameters() if p.requires_grad), settings.device)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(gpt.config, config, gpt)
    for layer in own:
        # Megatron has just attached the gradient buffers to the weights.
        layer.experts.adds_to_main_grads = settings.experts.keeps_ours
    optimizer = build_adamw(wrapped, local, rules, optim, settings)
    train_module = MegatronTrainModule(
        model, skeleton, wrapped, optimizer, rules, optim, dims, groups, settings
    )
    # Filled last, when every tensor is in its final memory.
    train_module.take(weights)
    return train_module
