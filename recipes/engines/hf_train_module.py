"""Train module of the engines that run a transformers model by one call.

Letters: B samples of a micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.data.samples import TokenMetadata
from recipes.engines.base import Engine, TrainModule
from recipes.engines.micro_batch import MicroBatch
from recipes.models.hf.deferred_init import persistent_buffers
from recipes.models.hf.document_inputs import document_inputs
from recipes.models.hf.head_losses import computes_losses
from recipes.models.hf.hf_model import HFModel


class HFTrainModule(TrainModule):
    """Forward passes of a transformers model; subclasses add gradients, updates and checkpoints.

    Attributes:
        engine: The engine that prepared it.
        model: The model with its routers.
        wrapped: The module that is called: the model's own, or the engine's wrapper of it.
        autocast: Whether forward passes run under torch's autocast to bf16.
    """

    def __init__(self, engine: Engine[Any], model: HFModel, wrapped: nn.Module, autocast: bool) -> None:
        self.engine = engine
        self.model = model
        self.wrapped: Any = wrapped
        self.autocast = autocast

    def _begin(self, micro_batch: int, count: int) -> None:
        """Tells the layers which of a step's micro-batches comes next, and the scale of its gradients."""
        run = self.model.context
        run.micro_batch, run.num_micro_batches, run.loss_scale = micro_batch, count, 1.0 / count

    def _losses(self, batch: MicroBatch) -> Tensor:
        """Returns the ``[B, S]`` losses of a micro-batch's targets."""
        tokens_BS1 = batch.tokens_BS1.to(self.engine.device)
        with computes_losses(self.model.module, tokens_BS1[:, 1:]):
            losses: Tensor = self._call(tokens_BS1[:, :-1], batch.metadata)
        return losses.view_as(tokens_BS1[:, 1:])

    def _call(self, tokens_BS: Tensor, metadata: TokenMetadata | None = None) -> Any:
        """Runs a forward pass, under autocast if the precision asks for it."""
        device = self.engine.device
        inputs: dict[str, Any] = {"input_ids": tokens_BS, "use_cache": False}
        real_BS = None
        if metadata is not None:
            inputs |= document_inputs(self.model.module, metadata.positions_BS)
            real_BS = None if metadata.real_BS is None else metadata.real_BS.to(device)
        with (
            self.model.padded(real_BS),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast),
        ):
            return self.wrapped(**inputs)

    @torch.no_grad()
    def token_losses(self, tokens_BS1: Tensor, metadata: TokenMetadata | None = None) -> Tensor:
        """See `TrainModule.token_losses`."""
        self.model.module.eval()
        return self._losses(MicroBatch(tokens_BS1, metadata))

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """See `TrainModule.logits`."""
        self.model.module.eval()
        logits_BSV: Tensor = self._call(tokens_BS.to(self.engine.device)).logits
        return logits_BSV.float()

    def _after_update(self) -> None:
        """Advances the step, and updates the state that routers keep between steps."""
        self.model.context.step += 1
        for layer in self.model.routed_layers():
            layer.router.after_optimizer_step(layer.context)


def model_tensors(model: HFModel) -> dict[str, Tensor]:
    """Returns parameters, tied ones once, and the buffers that are part of the state, by name."""
    tensors: dict[str, Tensor] = {name: p.data for name, p in model.module.named_parameters()}
    return tensors | dict(persistent_buffers(model.module))
