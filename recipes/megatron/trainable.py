"""A host that Megatron trains.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recipes.checkpoint import LocalBlocks
from recipes.data.samples import Marks
from recipes.engines.base import Trainable, may_update
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.hosts.megatron import Blocks, Held, box, find_parts, gathered, host_tensors, live_blocks
from recipes.megatron.groups import Layout, Places
from recipes.megatron.optimizer import (
    Rule,
    copy_masters,
    drop_gradients,
    master_blocks,
    rule_of,
    state_tensors,
)
from recipes.megatron.shape import read_shape
from recipes.optim import OptimConfig


class MegatronTrainable(Trainable):
    """A GPT model in Megatron's data parallelism, with its optimizer.

    Attributes:
        host: Names, routers and their context; its other weights are Megatron's now.
    """

    def __init__(
        self,
        host: HuggingFaceHost,
        skeleton: HuggingFaceHost,
        chunk: Any,
        optimizer: Any,
        rules: Mapping[str, Rule],
        optim: OptimConfig,
        layout: Layout,
        places: Places,
        device: torch.device,
    ) -> None:
        self.host = host
        self._skeleton = skeleton
        self.chunk = chunk
        self.optimizer = optimizer
        self.optim_config = optim
        self.layout = layout
        self.places = places
        self.device = device
        self._shape = read_shape(host.config.to_dict())
        self._may_be_stale = False
        frozen = optim.frozen.groups
        self._frozen = [
            each.tensor
            for each in self.held
            if each.tensor.requires_grad and rule_of(each, rules).group in frozen
        ]

    @property
    def skeleton(self) -> HuggingFaceHost:
        """See `Trainable.skeleton`."""
        return self._skeleton

    @property
    def held(self) -> list[Held]:
        """What this rank's parameters and buffers are made of."""
        return find_parts(self.chunk.module, self.host, self.places, self.layout)

    def forward_backward(
        self, tokens_BS1: Tensor, micro_batch: int, num_micro_batches: int, marks: Marks | None = None
    ) -> Tensor:
        """See `Trainable.forward_backward`."""
        from megatron.core.distributed import finalize_model_grads

        run = self.host.context
        run.micro_batch, run.num_micro_batches = micro_batch, num_micro_batches
        run.loss_scale = 1.0 / num_micro_batches
        self.chunk.train()
        losses_BS = self._losses(tokens_BS1, marks)
        loss = losses_BS.mean() if marks is None else (losses_BS * marks.weights_BS.to(losses_BS)).sum()
        (loss * run.loss_scale).backward()
        if micro_batch == num_micro_batches - 1:
            finalize_model_grads([self.chunk])
        return loss.detach()

    def _losses(self, tokens_BS1: Tensor, marks: Marks | None) -> Tensor:
        tokens_BS1 = tokens_BS1.to(self.device)
        losses_BS: Tensor = self._forward(tokens_BS1[:, :-1], marks, tokens_BS1[:, 1:].contiguous())
        return losses_BS

    def _forward(
        self, tokens_BS: Tensor, marks: Marks | None = None, targets_BS: Tensor | None = None
    ) -> Tensor:
        """Losses of the targets, or without them the logits of the whole vocabulary."""
        window = self._shape.window
        length = tokens_BS.shape[1]
        assert window is None or length <= window, f"{length} tokens, and attention looks back {window}"
        self._tell_routers(tokens_BS, marks)
        if self._may_be_stale:
            copy_masters(self.optimizer, self.chunk)
            self._may_be_stale = False
        out: Tensor = self.chunk(
            tokens_BS,
            None,
            _hidden(marks, self.device),
            labels=targets_BS,
            runtime_gather_output=targets_BS is None,
        )
        return out

    def _tell_routers(self, tokens_BS: Tensor, marks: Marks | None) -> None:
        """What the host's hook tells of a batch."""
        run = self.host.context
        if self.host.schedule is not None:
            run.top_k = self.host.schedule.at(run.step)
        run.token_ids = tokens_BS
        run.padding_mask = None if marks is None else marks.real_BS.to(self.device)

    @torch.no_grad()
    def step(self, lr_factor: float, norm_limit: float = math.inf) -> Tensor:
        """See `Trainable.step`."""
        self.optimizer.prepare_grads()
        if self.host.context.step < self.optim_config.frozen.steps:
            drop_gradients(self.optimizer, self._frozen)
        norm = float(self.optimizer.get_grad_norm())
        if may_update(norm, norm_limit):
            self._clip(norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["max_lr"] * lr_factor
            self.optimizer.step_with_ready_grads()
            self.host.context.step += 1
            for _, layer in self.host.moe_layers():
                layer.router.after_optimizer_step(layer.context)
        self.optimizer.zero_grad()
        self.chunk.zero_grad_buffer()
        return torch.tensor(norm)

    def _clip(self, norm: float) -> None:
        limit = self.optim_config.clip_norm
        factor = 1.0 if limit is None else limit / (norm + 1e-6)
        if factor < 1.0:
            groups = self.optimizer.param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, marks: Marks | None = None) -> Tensor:
        """See `Trainable.token_losses`."""
        self.chunk.eval()
        return self._losses(tokens_BS1, marks)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `Trainable.logits`."""
        self.chunk.eval()
        length = tokens_BS.shape[1]
        # Sequences are cut evenly; what follows a position does not change it.
        spare = -length % (self.layout.tensor if self.layout.sequence else 1)
        padded_BS = torch.nn.functional.pad(tokens_BS.to(self.device), (0, spare))
        return self._forward(padded_BS)[:, :length].float()

    def checkpoint_tensors(self) -> dict[str, Any]:
        """See `Trainable.checkpoint_tensors`."""
        # Whoever holds them may write into them.
        self._may_be_stale = self._keeps_masters
        live = {f"model.{name}": blocks for name, blocks in self._blocks().items()}
        tensors = {name: LocalBlocks(own.shape, own.shards) for name, own in live.items() if own.shards}
        return tensors | state_tensors(self.optimizer, self.held)

    @property
    def _keeps_masters(self) -> bool:
        return any(each.tensor.dtype == torch.bfloat16 for each in self.held)

    def _blocks(self) -> dict[str, Blocks]:
        """The fp32 weights, by the host's names."""
        held = self.held
        low = [each for each in held if each.tensor.dtype == torch.bfloat16]
        high = [each for each in held if each.tensor.dtype != torch.bfloat16]
        return live_blocks(high) | master_blocks(self.optimizer, low)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable.full_tensors`."""
        return gathered(self._blocks(), self.places, list(host_tensors(self.skeleton)))

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies weights of the host into those that are trained. Collective."""
        for name, own in self._blocks().items():
            for shard in own.shards:
                shard.tensor.copy_(box(tensors[name], shard.offset, shard.tensor.shape))
        self._may_be_stale = self._keeps_masters


def _hidden(marks: Marks | None, device: torch.device) -> Tensor | None:
    """``[B, 1, S, S]``, True where a position does not see another; None where it sees all before it.

    Rotary embeddings depend on distances alone, so that positions need not begin anew with a conversation.
    """
    if marks is None or marks.positions_BS is None:
        return None
    positions_BS = marks.positions_BS.to(device)
    begins_BS = torch.nn.functional.pad(positions_BS[:, 1:] - positions_BS[:, :-1] != 1, (1, 0))
    number_BS = begins_BS.cumsum(1)
    same_BSS = number_BS[:, :, None] == number_BS[:, None, :]
    return ~same_BSS.tril()[:, None]
