"""Figure of loss over tokens, training FLOPs and dense length, and against the cost of serving."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from recipes.studies.upcycle_vs_cpt.collect_arms import READINGS, Cell, Curve, Found
from recipes.tracking.report import canvas, formats
from recipes.tracking.report.colours import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCRATCH = {"light": "#2f8556", "dark": "#5fc18d"}
_SHORT = {"dense": "dense", "cpt": "continued", "moe": "upcycled", "scratch": "scratch"}
_TERA = 1e-12
_MARKERS, _SIGNS = ("o", "s", "D", "^", "v", "P"), "\u25cf\u25a0\u25c6\u25b2\u25bc\u271a"
_LOSS = "validation loss (nats/token)"
_HEADROOM = 0.35  # of the losses' range: what is far above the dense model is not shown
_GAP_NAMES = {
    "cpt_tokens": "dense continued,\nequal tokens",
    "cpt_flops": "dense continued,\nequal FLOPs",
    "scratch_free": "scratch, dense\nnot counted",
    "scratch_total": "scratch, dense\ncounted",
}
_SERVED = ("dense", "cpt_flops", "moe", "scratch_total")


def draw(found: Found, theme: Theme) -> Figure:
    """Draws all panels; the first two rows have one for each length."""
    lengths = found.lengths
    figure = canvas.new_figure(11.2, theme)
    rows = figure.subfigures(4, 1, height_ratios=(1.0, 1.0, 0.95, 1.0))
    for row in rows:
        row.set_facecolor(theme.background)
    over_tokens = rows[0].subplots(1, len(lengths), squeeze=False)[0]
    over_flops = rows[1].subplots(1, len(lengths), squeeze=False)[0]
    for place, length in enumerate(lengths):
        _tokens_panel(over_tokens[place], found.of(length), theme, first=place == 0)
        _flops_panel(over_flops[place], found.of(length), theme, first=place == 0)
    _share_limits([*over_tokens, *over_flops], found)
    for axes, length in zip(over_tokens, lengths, strict=True):
        _name_ends(axes, found.of(length), theme)
    gaps = rows[2].subplots(1, 2)
    _gap_panel(gaps[0], found, theme, ("cpt_tokens", "cpt_flops"))
    _gap_panel(gaps[1], found, theme, ("scratch_free", "scratch_total"))
    order = ", ".join(f"{length}" for length in lengths)
    canvas.note(gaps[0], f"Above the line upcycling is ahead. Left to right: {order} dense steps", theme)
    canvas.note(gaps[1], "Another scale. Marker: a seed, bar: mean", theme)
    served = rows[3].subplots(1, 2)
    _serving_panel(served[0], found, theme, "bytes_per_token", "bytes touched per token, decode (16 bit)")
    _serving_panel(served[1], found, theme, "flops_per_token", "FLOPs per token, decode")
    return figure


def colour_of(arm: str, theme: Theme) -> str:
    """Returns the colour of an arm."""
    return _SCRATCH[theme.name] if arm == "scratch" else theme.of(arm)


def _tokens_panel(axes: Axes, cells: list[Cell], theme: Theme, *, first: bool) -> None:
    """Draws equal tokens: all arms from 0 to the same end."""
    canvas.style(axes, theme, x="tokens after the dense model", y=_LOSS if first else "")
    end = cells[0].readings["moe"].tokens
    for cell in cells:
        for arm, ends in (("cpt", ["cpt_tokens"]), ("moe", ["moe"]), ("scratch", ["scratch_0"])):
            if arm in cell.curves:
                branches = [cell.curves[stage] for stage in ends]
                _arm(axes, cell.curves[arm], branches, colour_of(arm, theme), until=end)
    _dense_line(axes, cells, theme)
    canvas.token_ticks(axes)
    axes.set_xlim(0, end * 1.03)
    dense = formats.count(float(cells[0].dense_tokens))
    canvas.note(axes, f"Equal tokens, after {cells[0].length} dense steps ({dense} tokens)", theme)


def _flops_panel(axes: Axes, cells: list[Cell], theme: Theme, *, first: bool) -> None:
    """Draws all training FLOPs: continued arms begin where the dense model ended."""
    canvas.style(axes, theme, x="training TFLOP, the dense model's own counted", y=_LOSS if first else "")
    for cell in cells:
        curves, sunk = cell.curves, cell.sunk_flops
        for arm, ends in (("cpt", ["cpt_tokens", "cpt"]), ("moe", ["moe"])):
            branches = [curves[stage] for stage in ends]
            _arm(axes, curves[arm], branches, colour_of(arm, theme), scale=_TERA, shift=sunk)
        if "scratch" in curves:
            colour, stem = colour_of("scratch", theme), curves["scratch"]
            total = curves.get(f"scratch_{cell.length}", stem)
            _arm(axes, stem, [total], colour, scale=_TERA, until=total.tokens[-1])
            free = curves["scratch_0"]
            end = free.tokens[-1]
            _arm(axes, stem, [free], colour, scale=_TERA, until=end, shift=sunk, gift=True)
    cell = cells[0]
    axes.axvline(cell.sunk_flops * _TERA, color=theme.muted, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(0, (cell.sunk_flops + cell.readings["moe"].flops) * _TERA * 1.03)
    _dense_line(axes, cells, theme)
    canvas.note(axes, "Equal FLOPs. Hollow: from scratch, were the dense model free", theme)


def _arm(
    axes: Axes,
    longest: Curve,
    branches: list[Curve],
    colour: str,
    *,
    scale: float | None = None,
    until: float = math.inf,
    shift: float = 0.0,
    gift: bool = False,
) -> None:
    """Draws the part of constant learning rate as a line, and from it every decay to a finished run.

    Args:
        axes: Axes to draw on.
        longest: Run that the others branch off from.
        branches: Finished runs, including the longest.
        colour: Colour of the arm.
        scale: Factor on FLOPs; None for tokens.
        until: Tokens at the end of the line.
        shift: FLOPs at the start of the line.
        gift: If True the arm is hollow and dotted.
    """

    def place(tokens: float) -> float:
        return tokens if scale is None else (shift + tokens * longest.flops_per_token) * scale

    stem = [
        (tokens, loss)
        for tokens, loss in zip(longest.tokens, longest.losses, strict=True)
        if tokens <= min(longest.constant, until)
    ]
    kind: Any = (0, (1, 1.5)) if gift else "-"
    axes.plot(
        [place(t) for t, _ in stem], [loss for _, loss in stem], color=colour, linewidth=1.3, alpha=0.7,
        linestyle=kind, marker="" if gift else ".", markersize=4,
    )  # fmt: skip
    for branch in branches:
        before = [point for point in stem if point[0] <= branch.constant] or stem[:1]
        x = [place(before[-1][0]), place(branch.tokens[-1])]
        y = [before[-1][1], branch.losses[-1]]
        axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.6, linestyle=(0, (2, 2)))
        axes.plot(x[1:], y[1:], "o", color=colour, markersize=5, markerfacecolor="none" if gift else colour)


def _dense_line(axes: Axes, cells: list[Cell], theme: Theme) -> None:
    start = _mean([cell.readings["dense"].loss for cell in cells])
    axes.axhline(start, color=theme.dense, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)


def _share_limits(panels: list[Axes], found: Found) -> None:
    """Sets one scale for all curves, from the lowest loss to a little above the worst dense model."""
    losses = [at.loss for cell in found.cells for at in cell.readings.values()]
    dense = [cell.readings["dense"].loss for cell in found.cells]
    room = max(dense) - min(losses)
    for axes in panels:
        axes.set_ylim(min(losses) - 0.06 * room, max(dense) + _HEADROOM * room)


def _name_ends(axes: Axes, cells: list[Cell], theme: Theme) -> None:
    labels = []
    for name in ("dense", "cpt_tokens", "moe", "scratch_free"):
        ends = [cell.readings[name].loss for cell in cells if name in cell.readings]
        if ends:
            arm = READINGS[name][1]
            labels.append((_mean(ends), f"{_SHORT[arm]}\n{_mean(ends):.3f}", colour_of(arm, theme)))
    high = axes.get_ylim()[1]
    shown = [(min(y, high), text, colour) for y, text, colour in labels]
    canvas.label_lines(axes, shown, gap=0.19)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _gap_panel(axes: Axes, found: Found, theme: Theme, names: tuple[str, ...]) -> None:
    """Draws the distance of other arms above the upcycled model, seed by seed."""
    canvas.style(axes, theme, y="loss above upcycled (nats)" if "cpt_tokens" in names else "")
    axes.axhline(0.0, color=theme.moe, linewidth=1.4)
    lengths = found.lengths
    width = len(lengths) + 0.6
    for (group, name), (place, length) in itertools.product(enumerate(names), enumerate(lengths)):
        gap, x = found.behind(length, name), group * width + place
        if gap is None:
            continue
        colour = colour_of(READINGS[name][1], theme)
        marker = _MARKERS[place % len(_MARKERS)]
        axes.plot([x] * len(gap.values), gap.values, marker, color=colour, markersize=4.5, alpha=0.65)
        axes.plot([x], [gap.mean], "_", color=colour, markersize=17, markeredgewidth=2.0)
        _write(axes, x + 0.12, gap.mean, f"{gap.mean:+.3f}", colour, theme)
    middle = (len(lengths) - 1) / 2
    axes.set_xticks([g * width + middle for g in range(len(names))], [_GAP_NAMES[n] for n in names])
    axes.set_xlim(-0.6, (len(names) - 1) * width + len(lengths) - 0.2)
    axes.margins(y=0.15)


def _serving_panel(axes: Axes, found: Found, theme: Theme, figure: str, label: str) -> None:
    """Draws loss at equal training FLOPs against a serving cost, filled at the first batch only."""
    canvas.style(axes, theme, x=label, y=_LOSS if figure == "bytes_per_token" else "")
    cases = itertools.product(enumerate(found.lengths), enumerate(_batches(found)))
    for (place, length), (number, batch) in cases:
        known = {name: _served(found, length, name, figure, batch) for name in _SERVED}
        points = {name: point for name, point in known.items() if point is not None}
        line = [points[name] for name in ("cpt_flops", "moe") if name in points]
        axes.plot([x for x, _ in line], [y for _, y in line], color=theme.muted, linewidth=0.9, zorder=1)
        for name, (x, y) in points.items():
            colour = colour_of(READINGS[name][1], theme)
            face = colour if number == 0 else "none"
            axes.plot(
                [x], [y], _MARKERS[place % len(_MARKERS)], color=colour, markersize=7, markerfacecolor=face
            )
    _plain_ticks(axes)
    if figure == "flops_per_token":
        canvas.note(axes, "Colours as above. The same at every batch", theme)
        return
    axes.set_xscale("log")
    _plain_ticks(axes)
    legend = ", ".join(f"{mark} {n} steps" for mark, n in zip(_SIGNS, found.lengths, strict=False))
    first = _batches(found)[0]
    sizes = f"filled: batch {first}"
    canvas.note(axes, f"At equal training FLOPs; {legend}; {sizes}", theme)


def _served(found: Found, length: int, name: str, figure: str, batch: int) -> tuple[float, float] | None:
    """Returns cost and mean loss; None where either is unknown."""
    loss = found.loss(length, name)
    model = "dense" if READINGS[name][1] in ("dense", "cpt") else "moe"
    entries = found.of(length)[0].serving[model]
    if loss is None or entries is None:
        return None
    return next(entry[figure] for entry in entries if entry["batch"] == batch), loss.mean


def _batches(found: Found) -> list[int]:
    entries = found.cells[0].serving["dense"] or []
    return [entry["batch"] for entry in entries]


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    is_log = axes.get_xscale() == "log"
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if is_log else MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: canvas.tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _write(axes: Axes, x: float, y: float, text: str, colour: str, theme: Theme) -> None:
    box = {"facecolor": theme.background, "edgecolor": "none", "pad": 0.8}
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8,
        va="center",
        bbox=box,
    )
