"""What trainables have in common whose model is a host of transformers, run by one call.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.data.samples import TokenMetadata
from recipes.engines.base import Engine, MicroBatch, TrainModule
from recipes.models.hf.hf_model import HFModel


class HFTrainModule(TrainModule):
    """Losses and logits of a host; a subclass says how it is called, and how gradients and updates come."""

    def __init__(self, engine: Engine[Any], model: HFModel) -> None:
        self.engine = engine
        self.model = model
        self._real_BS: Tensor | None = None
        # A model that is still held elsewhere does not keep its trainable.
        this = weakref.ref(self)

        def tell_padding(module: nn.Module, args: tuple[Any, ...]) -> None:
            train_module = this()
            if train_module is not None and train_module._real_BS is not None:
                model.context.padding_mask = train_module._real_BS

        # Behind the host's own hook, which knows padding from attention masks alone.
        model.module.register_forward_pre_hook(tell_padding)

    @abstractmethod
    def _call(self, **inputs: Any) -> Tensor:
        """``[B, S, V]`` logits, by the model as the engine has wrapped it."""

    @abstractmethod
    def micro_batch_backward(
        self,
        tokens_BS1: Tensor,
        micro_batch: int,
        num_micro_batches: int,
        metadata: TokenMetadata | None = None,
    ) -> Tensor:
        """Adds a micro-batch's share of the step's gradients, and returns its loss; see `forward_backward`.

        Args:
            tokens_BS1: See `MicroBatch`.
            micro_batch: Index within the step.
            num_micro_batches: Micro-batches of the step.
            metadata: See `MicroBatch`.
        """

    def forward_backward(self, micro_batches: Iterator[MicroBatch], count: int) -> list[Tensor]:
        """See `TrainModule.forward_backward`; one after the other."""
        return [
            self.micro_batch_backward(batch.tokens_BS1, number, count, batch.metadata)
            for number, batch in enumerate(micro_batches)
        ]

    def _begin(self, micro_batch: int, num_micro_batches: int) -> None:
        """Tells the layers which micro-batch comes, and by what their losses' gradients are scaled."""
        run = self.model.context
        run.micro_batch, run.num_micro_batches = micro_batch, num_micro_batches
        run.loss_scale = 1.0 / num_micro_batches
        self.model.module.train()

    def _loss(self, tokens_BS1: Tensor, metadata: TokenMetadata | None) -> Tensor:
        """The mean of the losses, or their weighted sum."""
        losses_BS = self._losses(tokens_BS1, metadata)
        return losses_BS.mean() if metadata is None else (losses_BS * metadata.weights_BS.to(losses_BS)).sum()

    def _losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None) -> Tensor:
        tokens_BS1 = tokens_BS1.to(self.engine.device)
        logits_BSV = self._forward(tokens_BS1[:, :-1], metadata)
        targets_BS = tokens_BS1[:, 1:]
        losses = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
        return losses.view(targets_BS.shape)

    def _forward(self, tokens_BS: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        self._real_BS = None if metadata is None else metadata.real_BS.to(self.engine.device)
        more = {}
        if metadata is not None and metadata.positions_BS is not None:
            more["position_ids"] = metadata.positions_BS.to(self.engine.device)
        return self._call(input_ids=tokens_BS, use_cache=False, **more)

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """See `TrainModule.token_losses`."""
        self.model.module.eval()
        return self._losses(tokens_BS1, metadata)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `TrainModule.logits`."""
        self.model.module.eval()
        return self._forward(tokens_BS.to(self.engine.device)).float()

    def _after_update(self) -> None:
        """What changes between steps, changes."""
        self.model.context.step += 1
        for layer in self.model.routed_layers():
            layer.router.after_optimizer_step(layer.context)

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that are part of the state."""
        every = {name for name, _ in self.model.module.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.module.state_dict().items() if name not in every}
