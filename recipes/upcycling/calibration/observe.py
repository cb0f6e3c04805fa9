"""Runs text through a dense decoder and shows every batch to the statistics of its layers.

The hidden activations are computed again from a network's input, and their gradient follows from that of
its output, so that nothing has to be known of a family's modules beyond where the networks are.

Letters: B samples, S sequence length, T = B S tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.layer_statistics import LayerStatistics
from recipes.data.samples import TokenMetadata
from recipes.models.hf.document_inputs import document_inputs
from recipes.models.hf.ffn_blocks import FFNSite
from recipes.models.hf.hf_model import HFModel


@dataclass
class Observer:
    """Dense decoder whose layers' inputs are shown to statistics.

    Attributes:
        model: The decoder, on the device.
        sites: Its networks that are looked at, as found on that device.
        layers: Their statistics by the index of the block.
        compute_dtype: Dtype of matrix products.
    """

    model: HFModel
    sites: list[FFNSite]
    layers: Mapping[int, LayerStatistics]
    compute_dtype: torch.dtype = torch.float32
    _index_T: Tensor | None = None
    _mask_T: Tensor | None = None

    def show(
        self, tokens_BS1: Tensor, first_index_B: Tensor, gradient: bool, metadata: TokenMetadata | None = None
    ) -> None:
        """Runs a batch through the model.

        Args:
            tokens_BS1: ``[B, S + 1]`` ids; the last S are the targets of the first S.
            first_index_B: ``[B]`` int64 number of each sample's first token in the calibration text.
            gradient: Whether a statistic needs the gradient of the loss.
            metadata: What is known of the tokens: padding is not looked at, and targets count by their
                weights.
        """
        device = self.sites[0].weights.up_FD.device
        tokens_BS1 = tokens_BS1.to(device)
        S = tokens_BS1.shape[1] - 1
        self._index_T = (first_index_B[:, None] + torch.arange(S)).flatten().to(device)
        model = self.model.module
        weights_BS = real_BS = None
        more: dict[str, Tensor] = {}
        if metadata is not None:
            weights_BS, real_BS = metadata.weights_BS, metadata.real_BS
            more = document_inputs(model, metadata.positions_BS)
        self._mask_T = None if real_BS is None else real_BS.flatten().to(device)
        low = self.compute_dtype != torch.float32
        with (
            torch.set_grad_enabled(gradient),
            torch.autocast(device.type, dtype=self.compute_dtype, enabled=low),
        ):
            if not gradient:
                model.base_model(input_ids=tokens_BS1[:, :-1], use_cache=False, **more)
                return
            logits_BSV = model(input_ids=tokens_BS1[:, :-1], use_cache=False, **more).logits
            flat_TV, targets_T = logits_BSV.float().flatten(0, 1), tokens_BS1[:, 1:].flatten()
            # Summed: a token's gradient does not depend on how many share the batch.
            if weights_BS is None:
                loss = F.cross_entropy(flat_TV, targets_T, reduction="sum")
            else:
                losses_T = F.cross_entropy(flat_TV, targets_T, reduction="none")
                loss = (losses_T * weights_BS.flatten().to(device)).sum()
        loss.backward()

    @contextmanager
    def watching(self, gradient: bool) -> Iterator[None]:
        """Opens the statistics to `show`; weights are frozen and in evaluation mode."""
        model = self.model.module
        train_module = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training = model.training
        handles = [
            model.get_submodule(site.name).register_forward_hook(self._hook(site, gradient))
            for site in self.sites
        ]
        if gradient:
            # With frozen weights the graph begins at the embeddings.
            handles.append(model.get_input_embeddings().register_forward_hook(_begin_graph))
        model.eval()
        for parameter in train_module:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in train_module:
                parameter.requires_grad_(True)
            model.train(training)

    def _hook(self, site: FFNSite, gradient: bool) -> Callable[..., None]:
        statistics = self.layers[site.layer]

        def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x_TD = args[0].detach().flatten(0, -2).float()
            index_T, mask_T = self._index_T, self._mask_T
            assert index_T is not None and len(index_T) == len(x_TD), "a batch that show() did not start"
            if not gradient:
                statistics.update(LayerBatch(site.weights, x_TD, index_T, mask_T=mask_T))
                return

            def take(grad: Tensor) -> None:
                grad_TD = grad.detach().flatten(0, -2).float()
                with torch.autocast(x_TD.device.type, enabled=False):
                    statistics.update(LayerBatch(site.weights, x_TD, index_T, grad_TD, mask_T))

            out.register_hook(take)

        def guarded(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                look(module, args, out)

        return guarded


def _begin_graph(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    out.requires_grad_(True)
