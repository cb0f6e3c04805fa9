"""Measures how far upcycling moves a dense model before training, per layer and for the logits, on real text.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe.upcycle.equivalence import LayerDrift, LogitDrift, logit_drift
from recipes.models.hf.ffn_surgery import Surgery, SurgeryReport, chosen_sites, measuring, swap
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.load_entropy import load_entropies

LayerTensors = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class MethodDrift:
    """Drift of a model under one method.

    Attributes:
        claims_exact: Whether the method claims to preserve the function under this router.
        logits: Drift of the logits.
        dense_loss: Next-token loss of the dense model, in nats.
        loss: Next-token loss of the MoE model, in nats.
        layers: Drift of each layer on the input that it sees in the MoE model.
        load_entropy: Entropy of each layer's load over that of even load; 1 is balanced.
        parameters: Number of parameters of the MoE model.
    """

    claims_exact: bool
    logits: LogitDrift
    dense_loss: float
    loss: float
    layers: tuple[LayerDrift, ...]
    load_entropy: tuple[float, ...]
    parameters: int

    def mean(self, field: str) -> float:
        """Computes the mean over the layers of a field of `LayerDrift`."""
        return statistics.fmean(getattr(layer, field) for layer in self.layers)


@torch.no_grad()
def measure_drift(
    model: HFModel,
    surgery: Surgery,
    tokens_BS: Tensor,
    sources: Sequence[HFModel] = (),
    known: LayerTensors | None = None,
) -> MethodDrift:
    """Upcycles a model, measures it, and makes it dense again.

    A method that averages several checkpoints changes the other weights too; give it a model of its own.

    Args:
        model: The dense decoder.
        surgery: The recipe.
        tokens_BS: ``[B, S]`` real tokens.
        sources: The decoders of the method's own `sources`.
        known: Statistics by layer, for methods that need them.

    Raises:
        ConfigError: The method does not fit.
    """
    model.module.eval()
    dense_logits = model.module(input_ids=tokens_BS).logits
    with _swapped(model, surgery, sources, known) as swapped:
        drifts: list[LayerDrift] = []
        with measuring(swapped, drifts), load_entropies([layer for _, layer in swapped]) as loads:
            logits = model.module(input_ids=tokens_BS).logits
        return MethodDrift(
            claims_exact=all(surgery.method.is_exact(layer.router) for _, layer in swapped),
            logits=logit_drift(dense_logits, logits),
            dense_loss=_loss(dense_logits, tokens_BS),
            loss=_loss(logits, tokens_BS),
            layers=tuple(drifts),
            load_entropy=tuple(loads),
            parameters=sum(parameter.numel() for parameter in model.module.parameters()),
        )


@contextmanager
def _swapped(
    model: HFModel, surgery: Surgery, sources: Sequence[HFModel], known: LayerTensors | None
) -> Iterator[Any]:
    sites = chosen_sites(model, surgery.method)
    dense = [model.module.get_submodule(site.name) for site in sites]
    try:
        swapped = swap(model, surgery, sources, known)
        model.module.eval()
        yield swapped
    finally:
        for site, module in zip(sites, dense, strict=True):
            site.replace(model.module, module)


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    flat = logits_BSV[:, :-1].flatten(0, 1).float()
    return float(functional.cross_entropy(flat, tokens_BS[:, 1:].flatten()))


def layer_table(layers: Sequence[LayerDrift], load_entropy: Sequence[float]) -> str:
    """Formats a table with a line for each layer."""
    lines = [f"{'layer':>7}{'rel. error':>12}{'cosine':>9}{'gain':>8}{'load':>7}"]
    for drift, load in zip(layers, load_entropy, strict=True):
        figures = f"{drift.relative_error:>12.3f}{drift.cosine:>9.3f}{drift.gain:>8.2f}{load:>7.2f}"
        lines.append(f"{drift.layer:>7}{figures}")
    return "\n".join(lines)


def describe_surgery(report: SurgeryReport) -> str:
    """Describes the step-0 equivalence check in a line, with a table of layers for an inexact method."""
    head = f"surgery: {report.method} in layers {list(report.layers)}; logits of dense and MoE differ by "
    figures = f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest)"
    if report.claimed_exact:
        return f"{head}{figures}: exact"
    return (
        f"{head}{figures}, KL {report.logits.kl:.2e}: this method is not exact under this router. Outputs of "
        "each MoE layer against its dense network's, and the entropy of its load (1: even):\n"
        f"{layer_table(report.drifts, report.load_entropy)}"
    )


def summarise_surgery(report: SurgeryReport) -> dict[str, Any]:
    """Returns the step-0 equivalence check for ``summary.json``."""
    return {
        "method": report.method,
        "claimed_exact": report.claimed_exact,
        "max_logit_diff": report.logits.max_diff,
        "max_logit": report.logits.max_logit,
        "relative": report.logits.relative,
        "kl": report.logits.kl,
        "argmax_agreement": report.logits.argmax_agreement,
        "layers": [
            asdict(drift) | {"load_entropy": load}
            for drift, load in zip(report.drifts, report.load_entropy, strict=True)
        ],
    }
