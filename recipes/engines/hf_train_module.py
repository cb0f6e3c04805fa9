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

from recipes.data.samples import Marks
from recipes.engines.base import Engine, MicroBatch, Trainable
from recipes.models.hf.hf_model import HuggingFaceHost


class HostTrainable(Trainable):
    """Losses and logits of a host; a subclass says how it is called, and how gradients and updates come."""

    def __init__(self, engine: Engine[Any], host: HuggingFaceHost) -> None:
        self.engine = engine
        self.host = host
        self._real_BS: Tensor | None = None
        # A model that is still held elsewhere does not keep its trainable.
        this = weakref.ref(self)

        def tell_padding(module: nn.Module, args: tuple[Any, ...]) -> None:
            trainable = this()
            if trainable is not None and trainable._real_BS is not None:
                host.context.padding_mask = trainable._real_BS

        # Behind the host's own hook, which knows padding from attention masks alone.
        host.model.register_forward_pre_hook(tell_padding)

    @abstractmethod
    def _call(self, **inputs: Any) -> Tensor:
        """``[B, S, V]`` logits, by the model as the engine has wrapped it."""

    @abstractmethod
    def forward_backward(
        self, tokens_BS1: Tensor, micro_batch: int, num_micro_batches: int, marks: Marks | None = None
    ) -> Tensor:
        """Adds a micro-batch's share of the step's gradients, and returns its loss; see `accumulate`.

        Args:
            tokens_BS1: See `MicroBatch`.
            micro_batch: Index within the step.
            num_micro_batches: Micro-batches of the step.
            marks: See `MicroBatch`.
        """

    def accumulate(self, micro_batches: Iterator[MicroBatch], count: int) -> list[Tensor]:
        """See `Trainable.accumulate`; one after the other."""
        return [
            self.forward_backward(batch.tokens_BS1, number, count, batch.marks)
            for number, batch in enumerate(micro_batches)
        ]

    def _begin(self, micro_batch: int, num_micro_batches: int) -> None:
        """Tells the layers which micro-batch comes, and by what their losses' gradients are scaled."""
        run = self.host.context
        run.micro_batch, run.num_micro_batches = micro_batch, num_micro_batches
        run.loss_scale = 1.0 / num_micro_batches
        self.host.model.train()

    def _loss(self, tokens_BS1: Tensor, marks: Marks | None) -> Tensor:
        """The mean of the losses, or their weighted sum."""
        losses_BS = self._losses(tokens_BS1, marks)
        return losses_BS.mean() if marks is None else (losses_BS * marks.weights_BS.to(losses_BS)).sum()

    def _losses(self, tokens_BS1: Tensor, marks: Marks | None) -> Tensor:
        tokens_BS1 = tokens_BS1.to(self.engine.device)
        logits_BSV = self._forward(tokens_BS1[:, :-1], marks)
        targets_BS = tokens_BS1[:, 1:]
        losses = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
        return losses.view(targets_BS.shape)

    def _forward(self, tokens_BS: Tensor, marks: Marks | None = None) -> Tensor:
        self._real_BS = None if marks is None else marks.real_BS.to(self.engine.device)
        more = {}
        if marks is not None and marks.positions_BS is not None:
            more["position_ids"] = marks.positions_BS.to(self.engine.device)
        return self._call(input_ids=tokens_BS, use_cache=False, **more)

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

    def _after_update(self) -> None:
        """What changes between steps, changes."""
        self.host.context.step += 1
        for layer in self.host.routed_layers():
            layer.router.after_optimizer_step(layer.context)

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that are part of the state."""
        every = {name for name, _ in self.host.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.host.model.state_dict().items() if name not in every}
