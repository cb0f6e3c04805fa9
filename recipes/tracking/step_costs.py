"""Costs of a token and of a step, for the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from moe.accounting.training import StepModel


@dataclass(frozen=True)
class Costs:
    """Costs of a token, for utilisation and comparisons.

    Attributes:
        total_params: Parameters of the model.
        active_params: Parameters that one token uses.
        flops_per_token_forward: FLOPs at the run's sequence length; None where the attention is unknown.
        flops_per_token_train: FLOPs of forward and backward.
        peak_flops: Peak FLOP/s of one rank's device; None when unknown.
    """

    total_params: int
    active_params: int
    flops_per_token_forward: float | None
    flops_per_token_train: float | None
    peak_flops: float | None


@dataclass(frozen=True)
class StepCosts:
    """Further costs, for the sparsity-aware figures of a step.

    Attributes:
        model: Cost model; its MoE layers have the order of `moe.metrics.report_load`.
        weight_size: Bytes per element of the weights in products.
        peak_bytes_per_s: Bandwidth of one rank's device; None when unknown.
        uncounted: Reason why the bytes of a step are not counted; None where they are.
        counts_slots: True if experts compute the slots of a routing; see `RouterConfig.mixes_tokens`.
        readers: For every MoE layer, the ranks that share its experts: one reads an expert once for the
            tokens of all of them. Empty where every rank reads the experts of its own tokens.
    """

    model: StepModel
    weight_size: int
    peak_bytes_per_s: float | None
    counts_slots: bool = True
    readers: tuple[int, ...] = ()
    uncounted: str | None = None
