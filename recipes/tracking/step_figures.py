"""Figures of a step besides its loss: use of the hardware and figures of the routers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moe.accounting.training import StepTouched, training_step_bytes, used_flops_per_token
from moe.accounting.utilisation import Metric, above_one, share_of_peak
from moe.metrics import LoadReport
from recipes.tracking.step_costs import Costs, StepCosts


@dataclass(frozen=True)
class StepWork:
    """Work of one step.

    Attributes:
        tokens: Tokens over all ranks.
        seconds: Duration.
        ranks: Ranks that computed gradients.
        micro_batches: Micro-batches over all ranks.
        load: Load of the MoE layers.
        attention: Load of the attention experts.
    """

    tokens: int
    seconds: float
    ranks: int
    micro_batches: int
    load: LoadReport | None = None
    attention: LoadReport | None = None


@dataclass
class StepFigures:
    """Figures of the steps of one stage, which warn once of a utilisation above 1.

    Attributes:
        steps: Costs for S-MFU and S-MBU; None where they are not requested.
        end: Costs of a token with the final K of the routers, as in ``steps``.
        verbose: True on the rank that warns.
    """

    steps: StepCosts | None
    end: Costs
    verbose: bool = True
    _warned: set[str] = field(default_factory=set)

    def of_step(self, costs: Costs, work: StepWork) -> dict[str, float]:
        """Returns the step's use of the hardware; unknown figures are left out, see `missing`.

        Args:
            costs: Costs of a token at this step.
            work: The step.
        """
        row: dict[str, float] = {"active_params": costs.active_params}
        flops = costs.flops_per_token_train
        if flops is not None:
            row["flops_per_token"] = flops
            self._put(row, "MFU", flops * work.tokens, work, costs.peak_flops)
        used = self._used_flops(work)
        if used is not None:
            row["flops_per_token_used"] = used
            self._put(row, "S-MFU", used * work.tokens, work, costs.peak_flops)
        if self.steps is not None and self.steps.uncounted is None:
            row |= self._bandwidth(self.steps, work)
        return row

    def missing(self) -> dict[str, str]:
        """Returns the shares that no step has, with the reasons."""
        gone: dict[str, str] = {}
        if self.end.flops_per_token_train is None:
            gone |= dict.fromkeys(("mfu", "s_mfu"), "the accounting does not know this model's attention")
        elif self.end.peak_flops is None:
            gone |= dict.fromkeys(("mfu", "s_mfu"), "no peak FLOP/s of the device was asked for")
        elif self.steps is not None and not self.steps.counts_slots:
            gone["s_mfu"] = "this router's experts see mixtures of tokens, which a routing does not count"
        if self.steps is None:
            gone["s_mbu"] = "the bytes of a step were not asked for"
        elif self.steps.uncounted is not None:
            gone["s_mbu"] = self.steps.uncounted
        elif self.steps.peak_bytes_per_s is None:
            gone["s_mbu"] = "the memory bandwidth of the device is not known"
        return gone

    def _used_flops(self, work: StepWork) -> float | None:
        flops = self.end.flops_per_token_train
        if flops is None or self.steps is None or not self.steps.counts_slots:
            return None
        reports = [report for report in (work.load, work.attention) if report is not None]
        used = [number for report in reports for number in report.per_layer["experts_per_token"]]
        return used_flops_per_token(flops, self.steps.model.moe_blocks, used)

    def _bandwidth(self, steps: StepCosts, work: StepWork) -> dict[str, float]:
        reports = [report for report in (work.load, work.attention) if report is not None]
        touched = StepTouched(
            ranks=work.ranks,
            micro_batches=work.micro_batches,
            tokens=work.tokens,
            distinct=tuple(number for report in reports for number in report.distinct),
            distinct_in_step=tuple(number for report in reports for number in report.distinct_in_step),
            readers=steps.readers,
        )
        row = {"step_bytes": training_step_bytes(steps.model, touched, steps.weight_size).total}
        if work.load is not None:
            row["router/experts_touched"] = sum(work.load.distinct) / len(work.load.distinct)
        self._put(row, "S-MBU", row["step_bytes"], work, steps.peak_bytes_per_s)
        if max(steps.readers, default=1) > 1:
            row |= self._busiest(steps, work, reports, touched)
        return row

    def _busiest(
        self, steps: StepCosts, work: StepWork, reports: Sequence[LoadReport], touched: StepTouched
    ) -> dict[str, float]:
        """Returns bytes and share of the slowest rank, as if it read the most experts in every layer.

        They are those of ranks that all read as many experts.
        """
        each = [number for report in reports for number in report.busiest]
        once = [number for report in reports for number in report.busiest_in_step]
        most = replace(
            touched,
            distinct=tuple(number * count for number, count in zip(steps.readers, each, strict=True)),
            distinct_in_step=tuple(number * count for number, count in zip(steps.readers, once, strict=True)),
        )
        amount = training_step_bytes(steps.model, most, steps.weight_size).total
        row = {"step_bytes_busiest_rank": amount / work.ranks}
        share = share_of_peak(amount, work.seconds, steps.peak_bytes_per_s, work.ranks)
        return row if share is None else row | {"s_mbu_busiest_rank": share}

    def _put(
        self, row: dict[str, float], metric: Metric, amount: float, work: StepWork, peak: float | None
    ) -> None:
        share = share_of_peak(amount, work.seconds, peak, work.ranks)
        if share is None:
            return
        row[metric.lower().replace("-", "_")] = share
        warning = above_one(metric, share)
        if warning is not None and self.verbose and metric not in self._warned:
            self._warned.add(metric)
            warnings.warn(warning, stacklevel=2)


def router_figures(load: LoadReport | None, kind: str = "") -> dict[str, float]:
    """Returns the figures of the routers, as means over the layers and layer by layer."""
    if load is None:
        return {}
    row = {f"{kind}router/{name}": value for name, value in load.means().items()}
    for name, values in load.per_layer.items():
        for layer, value in zip(load.layers, values, strict=True):
            row[f"layer/{layer:02d}/{kind}{name}"] = value
    return row
