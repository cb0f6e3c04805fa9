"""The curves of a run: losses over tokens, and how balanced the routing was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.tracking.report import canvas, formats
from recipes.tracking.report.colours import Theme
from recipes.tracking.report.results_table import find, label_of, read_results, start_of
from recipes.tracking.report.run_record import Floats, Row, RunRecord, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

_TOKENS = "training tokens after the starting checkpoint"
_WARM_UP = 0.1  # of the tokens
_MAX_POINTS = 1500  # of a training curve; more would not be seen
_SMOOTHING = 20  # a training loss is averaged over this part of its steps
_BALANCE = (
    ("maxvio", "MaxVio\n(max load / mean - 1)"),
    ("load_cv", "load CV\n(std / mean)"),
    ("entropy", "router entropy\n(1 = ln E, uniform)"),
)


def loss_figure(record: RunRecord, theme: Theme) -> Figure | None:
    """Draws validation loss over tokens of upcycled and dense model; None where no loss was logged."""
    stages = [stage for stage in ("cpt", "moe") if stage in record.stages] or [
        stage for stage in ("dense",) if stage in record.stages
    ]
    curves = {stage: _curves(record.stages[stage]) for stage in stages}
    start = _start_loss(record) if stages != ["dense"] else None
    if not any(x.size for pair in curves.values() for x, _ in pair):
        return None
    figure = canvas.new_figure(4.3, theme)
    axes = figure.add_subplot()
    x_label = "training tokens" if stages == ["dense"] else _TOKENS
    canvas.style(axes, theme, x=x_label, y="cross-entropy (nats/token)")
    labels = [_draw_stage(axes, stage, curves[stage], theme, _name(record, stage)) for stage in stages]
    if start is not None:
        axes.axhline(start, color=theme.dense, linewidth=1.6, linestyle=(0, (5, 3)), zorder=2)
        name = start_of(read_results(record.summary)).label
        labels.append((start, f"{name}\n{formats.loss(start)}", theme.dense))
    canvas.token_ticks(axes)
    end = max(float(x[-1]) for pair in curves.values() for x, _ in pair if x.size)
    axes.set_xlim(0, end if end > 0 else 1)
    low, high = _limits(curves, start, end)
    axes.set_ylim(low, high)
    _mark_high_starts(axes, {stage: curves[stage][0] for stage in stages}, high, theme, record)
    canvas.label_lines(axes, [label for label in labels if label is not None], gap=0.13)
    canvas.note(
        axes, f"Bold: validation loss. Faint: training loss, mean of 1/{_SMOOTHING} of the steps.", theme
    )
    return figure


def balance_figure(record: RunRecord, theme: Theme) -> Figure | None:
    """Draws MaxVio, load CV and router entropy over tokens; None where none was logged."""
    rows = record.stages.get("moe", ())
    shown = [(name, label) for name, label in _BALANCE if series(rows, f"router/{name}")[0].size]
    if not shown:
        return None
    figure = canvas.new_figure(0.7 + 1.65 * len(shown), theme)
    stack: list[Axes] = list(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0])
    end = 0.0
    for axes, (name, label) in zip(stack, shown, strict=True):
        canvas.style(axes, theme, y=label)
        for key in _layer_keys(rows, name):
            axes.plot(*_thin(*series(rows, key)), color=theme.moe, linewidth=0.7, alpha=0.22)
        tokens, values = series(rows, f"router/{name}")
        axes.plot(*_thin(tokens, values), color=theme.moe, linewidth=1.8, marker=_dot(tokens))
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(_few_ticks())
        canvas.label_lines(axes, [(float(values[-1]), formats.small(float(values[-1])), theme.moe)])
        end = max(end, float(tokens[-1]))
    figure.align_ylabels(stack)
    canvas.note(stack[0], "Bold: mean over the MoE layers. Faint: each layer.", theme)
    stack[-1].set_xlabel(_TOKENS, fontsize=9, color=theme.text)
    stack[-1].set_xlim(0, end if end > 0 else 1)
    canvas.token_ticks(stack[-1])
    return figure


Pair = tuple[Floats, Floats]


def _curves(rows: Sequence[Row]) -> tuple[Pair, Pair]:
    return series(rows, "val_loss"), _smooth(series(rows, "loss"))


def _smooth(curve: Pair) -> Pair:
    """Smooths by trailing means, because the noise of single steps would hide the validation loss."""
    tokens, values = curve
    window = max(1, values.size // _SMOOTHING)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return tokens[window - 1 :], (sums[window:] - sums[:-window]) / window


def _name(record: RunRecord, stage: str) -> str:
    label = find(read_results(record.summary), stage).label
    return label if label != "?" else label_of(stage)


def _start_loss(record: RunRecord) -> float | None:
    """Returns the validation loss of the model given, from the summary or a dense one's own training."""
    known = start_of(read_results(record.summary)).val_loss
    _, values = series(record.stages.get("dense", ()), "val_loss")
    return known if known is not None else (float(values[-1]) if values.size else None)


def _draw_stage(
    axes: Axes, stage: str, curves: tuple[Pair, Pair], theme: Theme, name: str
) -> tuple[float, str, str] | None:
    """Draws validation and training loss of a stage; returns the label of its end, None without a curve."""
    (val_x, val_y), (train_x, train_y) = curves
    colour = theme.of(stage)
    if train_x.size:
        axes.plot(*_thin(train_x, train_y), color=colour, linewidth=0.8, alpha=0.3, zorder=1)
    if val_x.size:
        marker = "o" if val_x.size <= 40 else None
        axes.plot(val_x, val_y, color=colour, linewidth=2.0, marker=marker, markersize=3.5, zorder=3)
        axes.plot(val_x[-1:], val_y[-1:], color=colour, marker="o", markersize=4.5, zorder=4, clip_on=False)
        return float(val_y[-1]), f"{name}\n{formats.loss(float(val_y[-1]))}", colour
    if train_x.size:
        tail = float(train_y[-max(1, train_y.size // 20) :].mean())
        return tail, f"{name}\ntraining {formats.loss(tail)}", colour
    return None


def _limits(curves: Mapping[str, tuple[Pair, Pair]], start: float | None, end: float) -> tuple[float, float]:
    """Returns limits that hold all validation losses, and all training losses but spikes.

    A method that is not exact may start far above everything that follows; the chart then ends at 1.6 times
    the height of what comes after the first `_WARM_UP` of the tokens, so that this can be read.
    """
    pairs = [(val, (train[0], _core(train[1]))) for val, train in curves.values()]
    values = np.concatenate([np.array([] if start is None else [start]), *(y for p in pairs for _, y in p)])
    settled = [y[x > _WARM_UP * end] for (x, y), _ in pairs]
    later = np.concatenate([np.array([] if start is None else [start]), *settled])
    low, high = float(values.min()), float(values.max())
    if later.size > 1 and later.max() > low:
        high = min(high, low + 1.6 * (float(later.max()) - low))
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - pad, high + pad


def _mark_high_starts(
    axes: Axes, curves: Mapping[str, Pair], high: float, theme: Theme, record: RunRecord
) -> None:
    """Notes the start of a curve that enters the chart from above."""
    above = [(stage, float(y[0])) for stage, (_, y) in curves.items() if y.size and y[0] > high]
    for line, (stage, value) in enumerate(above):
        axes.annotate(
            f"{_name(record, stage)} starts at {formats.loss(value)}, above the chart",
            xy=(0.99, 0.97 - 0.07 * line),
            xycoords="axes fraction",
            color=theme.of(stage),
            fontsize=8.5,
            ha="right",
            va="top",
        )


def _core(values: Floats) -> Floats:
    """Returns the 1st and 98th percentile."""
    return np.percentile(values, [1, 98]) if values.size else values


def _thin(tokens: Floats, values: Floats) -> Pair:
    """Reduces a curve to at most `_MAX_POINTS` means of neighbours."""
    if tokens.size <= _MAX_POINTS:
        return tokens, values
    parts = min(_MAX_POINTS, tokens.size)
    pick = [np.array([part.mean() for part in np.array_split(axis, parts)]) for axis in (tokens, values)]
    return pick[0], pick[1]


def _layer_keys(rows: Sequence[Row], name: str) -> list[str]:
    pattern = re.compile(rf"layer/\d+/{name}")
    return sorted({key for row in rows for key in row if pattern.fullmatch(key)})


def _dot(tokens: Floats) -> str | None:
    """Returns a marker where a line would not be seen."""
    return "o" if tokens.size == 1 else None


def _few_ticks() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
