"""A host that Megatron trains.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.checkpoint import LocalBlocks
from recipes.data.samples import TokenMetadata
from recipes.engines.base import MicroBatch, TrainModule, may_update
from recipes.engines.megatron.gpt_shape import read_shape
from recipes.engines.megatron.hf_weights import (
    Blocks,
    Held,
    find_parts,
    gathered,
    live_blocks,
    model_tensors,
    placed,
)
from recipes.engines.megatron.megatron_optimizer import (
    Rule,
    copy_masters,
    drop_gradients,
    master_blocks,
    rule_of,
    state_tensors,
)
from recipes.engines.megatron.pipeline import from_last_stage, run_schedule, share_statistics
from recipes.engines.megatron.rank_groups import ParallelDims, Places
from recipes.engines.megatron.stages import blocks_of_stages
from recipes.engines.optim.optimizer import OptimConfig
from recipes.models.hf.deferred_init import WeightSource
from recipes.models.hf.hf_model import HFModel


class MegatronTrainModule(TrainModule):
    """This rank's stage of a GPT model in Megatron's data parallelism, with its optimizer.

    Attributes:
        model: Names, routers and their context; its other weights are Megatron's now.
    """

    def __init__(
        self,
        model: HFModel,
        skeleton: HFModel,
        chunk: Any,
        optimizer: Any,
        rules: Mapping[str, Rule],
        optim: OptimConfig,
        layout: ParallelDims,
        places: Places,
        device: torch.device,
    ) -> None:
        self.model = model
        self._skeleton = skeleton
        self.chunk = chunk
        self.optimizer = optimizer
        self.optim_config = optim
        self.layout = layout
        self.places = places
        self.device = device
        self._shape = read_shape(model.config.to_dict())
        self._blocks_here = blocks_of_stages(self._shape.layers, layout.pipeline)[places.stage]
        self._may_be_stale = False
        frozen = optim.frozen.groups
        self._frozen = [
            each.tensor
            for each in self.held
            if each.tensor.requires_grad and rule_of(each, rules).group in frozen
        ]

    @property
    def skeleton(self) -> HFModel:
        """See `TrainModule.skeleton`."""
        return self._skeleton

    @property
    def held(self) -> list[Held]:
        """What this rank's parameters and buffers are made of."""
        return find_parts(self.chunk.module, self.model, self.places, self.layout)

    def forward_backward(self, micro_batches: Iterator[MicroBatch], count: int) -> list[Tensor]:
        """See `TrainModule.forward_backward`."""
        numbers = iter(range(count))
        self.model.context.num_micro_batches, self.model.context.loss_scale = count, 1.0 / count

        def forward(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            tell = partial(self._tell_routers, batch, next(numbers))
            out = self._forward(batch, tell)
            if out.requires_grad:
                # By then later micro-batches have been through the routers, which recomputation runs again.
                out.register_hook(lambda _: tell())
            return out, partial(_loss, batch.metadata)

        self.chunk.train()
        self._refresh()
        found = run_schedule(self.chunk, forward, micro_batches, count, trains=True)
        share_statistics([layer.stats for _, layer in self.model.moe_layers()], self.places, self.device)
        return list(from_last_stage(found, (count,), self.places, self.device))

    def _forward(self, batch: MicroBatch, tell: Callable[[], None], *, logits: bool = False) -> Tensor:
        """What this stage makes of a batch: hidden states, or losses of the targets, or logits."""
        tokens_BS1 = batch.tokens_BS1.to(self.device)
        window, length = self._shape.window, tokens_BS1.shape[1] - 1
        assert window is None or length <= window, f"{length} tokens, and attention looks back {window}"
        tell()
        out: Tensor = self.chunk(
            tokens_BS1[:, :-1],
            None,
            _hidden(batch.metadata, self.device),
            labels=None if logits else tokens_BS1[:, 1:].contiguous(),
            runtime_gather_output=logits,
        )
        # Where matrices are cut the positions do not lie behind one another, as what is sent must.
        return out.contiguous()

    def _refresh(self) -> None:
        """Weights may have been changed from outside."""
        if self._may_be_stale:
            copy_masters(self.optimizer, self.chunk)
            self._may_be_stale = False

    def _tell_routers(self, batch: MicroBatch, micro_batch: int) -> None:
        """What the host's hook tells of a batch, and which of its step it is."""
        run, metadata, tokens_BS = (
            self.model.context,
            batch.metadata,
            batch.tokens_BS1[:, :-1].to(self.device),
        )
        run.micro_batch = micro_batch
        if self.model.schedule is not None:
            run.top_k = self.model.schedule.at(run.step)
        run.token_ids = tokens_BS
        run.padding_mask = None if metadata is None else metadata.real_BS.to(self.device)

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
        # All that a rank keeps of a stage may be frozen.
        if factor < 1.0 and grads:
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """See `TrainModule.token_losses`."""
        batch = MicroBatch(tokens_BS1, metadata)
        return self._evaluate(batch, (tokens_BS1.shape[0], tokens_BS1.shape[1] - 1))

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `TrainModule.logits`."""
        samples, length = tokens_BS.shape
        # Sequences are cut evenly; what follows a position does not change it. There are no targets.
        spare = -length % (self.layout.tensor if self.layout.sequence else 1)
        batch = MicroBatch(torch.nn.functional.pad(tokens_BS, (0, spare + 1)))
        shape = (samples, length + spare, self._shape.vocabulary)
        return self._evaluate(batch, shape, logits=True)[:, :length]

    def _evaluate(self, batch: MicroBatch, shape: tuple[int, ...], *, logits: bool = False) -> Tensor:
        """What the last stage makes of a batch, on all stages."""

        def forward(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            one = next(batches)
            out = self._forward(one, partial(self._tell_routers, one, 0), logits=logits)
            return out, lambda out, non_loss_data: out

        self.chunk.eval()
        self._refresh()
        found = run_schedule(self.chunk, forward, iter([batch]), 1, trains=False)
        return from_last_stage(found, (1, *shape), self.places, self.device)[0]

    def checkpoint_tensors(self) -> dict[str, Any]:
        """See `TrainModule.checkpoint_tensors`."""
        # Whoever holds them may write into them.
        self._may_be_stale = self._keeps_masters
        live = {f"model.{name}": blocks for name, blocks in self._blocks().items()}
        tensors = {name: LocalBlocks(own.shape, own.shards) for name, own in live.items() if own.shards}
        return tensors | state_tensors(self.optimizer, self.held)

    @property
    def _keeps_masters(self) -> bool:
        return any(each.tensor.dtype == torch.bfloat16 for each in self.held)

    def _blocks(self) -> dict[str, Blocks]:
        """The weights, by the host's names: in fp32, but for those that do not train and are kept once."""
        held = self.held
        low = [x for x in held if x.tensor.dtype == torch.bfloat16 and x.tensor.requires_grad]
        kept = {id(each) for each in low}
        live = [each for each in held if id(each) not in kept]
        return live_blocks(live) | master_blocks(self.optimizer, low)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainModule.full_tensors`."""
        names = list(model_tensors(self.skeleton))
        return gathered(self._blocks(), self.places, names, self.device)

    @torch.no_grad()
    def take(self, weights: WeightSource) -> None:
        """Fills the weights that are trained, in fp32 whatever the model computes in.

        Args:
            weights: Of everything that the host has, under its names.
        """
        weights.fill(placed(self._blocks()))
        self._may_be_stale = self._keeps_masters


def _loss(metadata: TokenMetadata | None, losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a micro-batch, which the schedule divides in place, and what is reported of it."""
    loss = losses_BS.mean() if metadata is None else (losses_BS * metadata.weights_BS.to(losses_BS)).sum()
    return loss, loss.detach().clone()


def _hidden(metadata: TokenMetadata | None, device: torch.device) -> Tensor | None:
    """``[B, 1, S, S]``, True where a position does not see another; None where it sees all before it.

    Rotary embeddings depend on distances alone, so that positions need not begin anew with a conversation.
    """
    if metadata is None or metadata.positions_BS is None:
        return None
    positions_BS = metadata.positions_BS.to(device)
    begins_BS = torch.nn.functional.pad(positions_BS[:, 1:] - positions_BS[:, :-1] != 1, (1, 0))
    number_BS = begins_BS.cumsum(1)
    same_BSS = number_BS[:, :, None] == number_BS[:, None, :]
    return ~same_BSS.tril()[:, None]
