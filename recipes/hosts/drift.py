"""How far each method moves a dense model before any training: per layer and for the logits, on real text.

Letters: B samples, S sequence length, T tokens, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.layer import MoELayer
from moe.types import Routing
from moe.upcycle.check import LayerDrift, LogitDrift, logit_drift
from recipes.hosts.huggingface import HuggingFaceHost, Surgery, chosen_sites, measuring, swap

LayerTensors = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class MethodDrift:
    """What one method does to a model.

    Attributes:
        claims_exact: Whether it claims to keep the function under this router.
        logits: Drift of the logits.
        dense_loss: Next-token loss of the dense model, in nats.
        loss: Of the mixture.
        layers: Drift of each layer on the input that it sees in the mixture.
        load_entropy: By layer, entropy of where the tokens go over that of even load: 1 is balanced.
        parameters: Of the mixture.
    """

    claims_exact: bool
    logits: LogitDrift
    dense_loss: float
    loss: float
    layers: tuple[LayerDrift, ...]
    load_entropy: tuple[float, ...]
    parameters: int

    def mean(self, field: str) -> float:
        """Mean over the layers of a field of `LayerDrift`."""
        return statistics.fmean(getattr(layer, field) for layer in self.layers)


@torch.no_grad()
def measure_drift(
    host: HuggingFaceHost,
    surgery: Surgery,
    tokens_BS: Tensor,
    sources: Sequence[HuggingFaceHost] = (),
    known: LayerTensors | None = None,
) -> MethodDrift:
    """Makes the mixture, measures it, and leaves the host dense again.

    A method that averages several checkpoints changes the rest of the host too; give it a host of its own.

    Args:
        host: The dense decoder.
        surgery: How it becomes a mixture.
        tokens_BS: ``[B, S]`` real tokens.
        sources: The decoders of the method's own `sources`.
        known: Statistics by layer, for methods that need some.

    Raises:
        ConfigError: The method does not fit.
    """
    host.model.eval()
    dense_logits = host.model(input_ids=tokens_BS).logits
    with _swapped(host, surgery, sources, known) as swapped:
        drifts: list[LayerDrift] = []
        with measuring(swapped, drifts), _routings([layer for _, layer in swapped]) as routings:
            logits = host.model(input_ids=tokens_BS).logits
        return MethodDrift(
            claims_exact=all(surgery.method.is_exact(layer.router) for _, layer in swapped),
            logits=logit_drift(dense_logits, logits),
            dense_loss=_loss(dense_logits, tokens_BS),
            loss=_loss(logits, tokens_BS),
            layers=tuple(drifts),
            load_entropy=tuple(_load_entropy(routing) for routing in routings),
            parameters=sum(parameter.numel() for parameter in host.model.parameters()),
        )


@contextmanager
def _swapped(
    host: HuggingFaceHost, surgery: Surgery, sources: Sequence[HuggingFaceHost], known: LayerTensors | None
) -> Iterator[Any]:
    sites = chosen_sites(host, surgery.method)
    dense = [host.model.get_submodule(site.name) for site in sites]
    try:
        swapped = swap(host, surgery, sources, known)
        host.model.eval()
        yield swapped
    finally:
        for site, module in zip(sites, dense, strict=True):
            site.replace(host.model, module)


@contextmanager
def _routings(layers: Sequence[MoELayer]) -> Iterator[list[Routing]]:
    found: list[Routing] = []

    def keep(module: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        found.append(routing)

    handles = [layer.router.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    flat = logits_BSV[:, :-1].flatten(0, 1).float()
    return float(functional.cross_entropy(flat, tokens_BS[:, 1:].flatten()))


def _load_entropy(routing: Routing) -> float:
    used_TK = torch.ones_like(routing.weights_TK, dtype=torch.bool)
    if routing.slot_mask_TK is not None:
        used_TK = routing.slot_mask_TK
    counts_E = torch.bincount(routing.expert_ids_TK[used_TK], minlength=routing.num_experts).double()
    share_E = counts_E / counts_E.sum().clamp_min(1)
    entropy = float(torch.special.entr(share_E).sum())
    return entropy / math.log(routing.num_experts)
