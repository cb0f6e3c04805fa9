"""Reports how far surgery moves a dense model, per layer and for the logits, on real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe.upcycle.equivalence import LayerDrift, LogitDrift, layer_drift


@dataclass(frozen=True)
class SurgeryReport:
    """Outcome of the surgery, and how exact it is.

    Attributes:
        method: Name of the upcycling method; None for a mixture, read as it is.
        layers: Indices of the blocks that are MoE layers.
        claimed_exact: Whether the method claims to preserve the function under this router.
        logits: Drift of the logits on real tokens.
        drifts: Drift of each layer on its own.
        load_entropy: Entropy of each layer's load over that of even load; 1 is balanced.
        loader: Code that has loaded the model it is compared with, for people.
        tokens: Tokens that it was measured on, for people.
    """

    method: str | None
    layers: tuple[int, ...]
    claimed_exact: bool
    logits: LogitDrift
    drifts: tuple[LayerDrift, ...]
    load_entropy: tuple[float, ...]
    loader: str = "Graft"
    tokens: str = ""


@contextmanager
def comparing(
    layers: Sequence[tuple[int, nn.Module, Callable[..., Tensor]]], drifts: list[LayerDrift]
) -> Iterator[None]:
    """Compares, while open, each forward pass of layers with dense functions of the same input.

    No activations are kept, so that it works for models of any depth.

    Args:
        layers: Block index, layer, and the dense function of the layer's arguments.
        drifts: Takes the drift of each forward pass.
    """

    def compare(
        number: int, dense: Callable[..., Tensor], module: Any, args: Any, kwargs: Any, out: Any
    ) -> None:
        ours = out[0] if isinstance(out, tuple) else out
        drifts.append(layer_drift(number, dense(*args, **kwargs), ours))

    handles = [
        layer.register_forward_hook(partial(compare, number, dense), with_kwargs=True)
        for number, layer, dense in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_table(layers: Sequence[LayerDrift], load_entropy: Sequence[float]) -> str:
    """Formats a table with a line for each layer."""
    lines = [f"{'layer':>7}{'rel. error':>12}{'cosine':>9}{'gain':>8}{'load':>7}"]
    for drift, load in zip(layers, load_entropy, strict=True):
        figures = f"{drift.relative_error:>12.3f}{drift.cosine:>9.3f}{drift.gain:>8.2f}{load:>7.2f}"
        lines.append(f"{drift.layer:>7}{figures}")
    return "\n".join(lines)


def describe_surgery(report: SurgeryReport) -> str:
    """Describes the step-0 equivalence check in a line, with a table of layers for an inexact method."""
    differ = f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest) on {report.tokens}"
    if report.method is None:
        return (
            f"surgery: Graft's layers in the place of {list(report.layers)}; logits of the mixture with them "
            f"and as loaded by {report.loader}, differ by {differ}: exact"
        )
    head = f"surgery: {report.method} in layers {list(report.layers)}; logits of dense and MoE differ by "
    figures = f"{differ}; the dense model was loaded by {report.loader}"
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
        "loader": report.loader,
        "tokens": report.tokens,
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
