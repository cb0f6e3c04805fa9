"""What a token and a step cost, as the loop is told."""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.training import StepModel


@dataclass(frozen=True)
class Costs:
    """What a token costs, for utilisation and the comparison.

    Attributes:
        total_params: Of the model.
        active_params: Those that one token uses.
        flops_per_token_forward: At the run's sequence length; None where the attention is not known.
        flops_per_token_train: Forward and backward.
        peak_flops: Of one rank's device; None when unknown.
    """

    total_params: int
    active_params: int
    flops_per_token_forward: float | None
    flops_per_token_train: float | None
    peak_flops: float | None


@dataclass(frozen=True)
class StepCosts:
    """What the sparsity-aware figures of a step need besides.

    Attributes:
        model: Its mixtures in the order of `moe.metrics.report_load`: networks first, then attention.
        weight_size: Bytes an element of weights as products read them.
        peak_bytes_per_s: Of one rank's device; None when unknown.
        uncounted: Why the bytes of a step are not counted; None where they are.
        counts_slots: Whether the slots of a routing are what experts compute; see `Router.mixes_tokens`.
        readers: Of every mixture, ranks over which its experts are spread: one reads an expert once for the
            tokens of all of them. Empty where every rank reads those of its own tokens.
    """

    model: StepModel
    weight_size: int
    peak_bytes_per_s: float | None
    counts_slots: bool = True
    readers: tuple[int, ...] = ()
    uncounted: str | None = None
