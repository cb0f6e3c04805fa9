"""Predicts the loss of upcycling and of training from scratch: ``python -m tools.plan_upcycle --help``."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.runtime.user_json import read_json_text
from tools.command import check_json_target, log_beside, run_command, tool_parser, write_json
from tools.fit_laws import check_figure_target, read_text

if TYPE_CHECKING:
    from moe.scaling_laws.planner import BreakEven, Plan
    from moe.scaling_laws.ways import Curve, Question, Way

NAMES = {"upcycle": "upcycle", "scratch": "MoE from scratch", "continue": "dense, continued"}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "plan_upcycle",
        "From a dense checkpoint and a budget: the loss of upcycling it, of training the MoE "
        "from scratch and of going on with the dense model, and the tokens at which the best one changes. By "
        "the published laws of one paper, or by laws fitted to your runs (tools.fit_laws --json).",
        example="--dense-params 7e9 --dense-tokens 2e12 --budget-tokens 1e11",
    )
    add = parser.add_argument
    add("--law", metavar="NAME", help="published laws: liew (default) or joint_moe")
    add("--upcycle-fit", metavar="JSON", help="law liew fitted to your upcycled runs")
    add("--scratch-fit", metavar="JSON", help="a law fitted to your MoEs from scratch")
    add("--dense-fit", metavar="JSON", help="a law fitted to your dense runs")
    add("--dense-params", type=float, required=True, metavar="N1", help="parameters of the checkpoint")
    add("--dense-tokens", type=float, required=True, metavar="D1", help="tokens it was trained on")
    add("--budget-tokens", type=float, metavar="D2", help="tokens to train on, the same for all")
    add(
        "--budget-flops", type=float, metavar="F", help="or budget in FLOPs, 6 per token and active parameter"
    )
    add("--active-params", type=float, metavar="N", help="parameters of the MoE that a token uses")
    add("--total-params", type=float, metavar="N", help="parameters of the whole MoE")
    add("--experts", type=int, default=8, metavar="E", help="routed experts of a layer")
    add("--top-k", type=int, default=2, metavar="K", help="experts per token")
    add("--granularity", type=float, default=1.0, metavar="G", help="dense over expert width")
    add("--figure", metavar="PNG", help="draw loss against D2 for the three ways")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the plan and returns 0.

    Raises:
        UserError: The flags or the fits have mistakes.
    """
    args = build_parser().parse_args(argv)
    from moe.scaling_laws.planner import plan
    from moe.scaling_laws.ways import Question

    curves = _curves(args)
    question = Question(
        dense_params=args.dense_params,
        dense_tokens=args.dense_tokens,
        budget_tokens=args.budget_tokens,
        budget_flops=args.budget_flops,
        active_params=args.active_params,
        total_params=args.total_params,
        num_experts=args.experts,
        top_k=args.top_k,
        granularity=args.granularity,
    )
    found = plan(question, curves)
    log = log_beside(args.json)
    log(summary(found))
    if args.figure:
        from recipes.tracking.report.canvas import write_png

        write_png(_figure(question, curves, found), Path(args.figure))
        log(f"\nfigure: {args.figure}")
    write_json(args.json, {"question": asdict(question), **_finite(asdict(found))})
    return 0


def _curves(args: argparse.Namespace) -> dict[Way, Curve]:
    """Returns the law of each way: all fitted or all published, because their losses do not compare."""
    from moe.errors import DataError, Mistake, UserError
    from moe.scaling_laws.record import curve_from_record
    from moe.scaling_laws.ways import FAMILIES, family

    mistakes = check_json_target(args.json) + check_figure_target(args.figure)
    fits: dict[Way, str] = {
        "upcycle": args.upcycle_fit,
        "scratch": args.scratch_fit,
        "continue": args.dense_fit,
    }
    fits = {way: path for way, path in fits.items() if path is not None}
    if fits and args.law is not None:
        rule = "losses of published laws and of your own runs are of other data and do not compare"
        mistakes.append(Mistake("--law", args.law, rule, "Leave out --law, or the --...-fit flags."))
    if args.law is not None and args.law not in FAMILIES:
        rule = "no published laws of this name cover two ways"
        mistakes.append(Mistake("--law", args.law, rule, f"Choose one of {', '.join(FAMILIES)}."))
    curves: dict[Way, Curve] = {}
    for way, path in fits.items():
        try:
            curves[way] = curve_from_record(read_json_text(read_text(path, f"--{way}-fit"), path), path)
        except ValueError as error:
            mistakes.append(
                Mistake(path, str(error), "it is not JSON", "Write it with tools.fit_laws --json.")
            )
        except DataError as error:
            mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)
    return curves if fits else family(args.law or "liew")


def summary(found: Plan) -> str:
    """Formats a plan as a table and sentences."""
    lines = [found.recommendation, "", f"  {'':22}{'tokens':>10}{'FLOPs':>10}{'loss':>8}   interval"]
    for outcome in found.outcomes:
        flops = "unknown" if outcome.flops is None else f"{outcome.flops:.3g}"
        loss = "unknown" if outcome.loss is None else f"{outcome.loss:.3f}"
        ends = "unknown" if outcome.interval is None else "{:.3f} to {:.3f}".format(*outcome.interval)
        name = NAMES[outcome.way]
        lines.append(f"  {name:22}{outcome.tokens:10.3g}{flops:>10}{loss:>8}   {ends}")
    lines.append("")
    for title, point in (
        ("upcycling against scratch", found.upcycle_against_scratch),
        ("going on against upcycling", found.continue_against_upcycle),
    ):
        lines.append(f"  {title}: {_break_even(point)}")
    for outcome in found.outcomes:
        lines += [
            "",
            f"  {NAMES[outcome.way]}: {outcome.law or 'no law'}",
            f"    assumes {outcome.assumption}",
        ]
        lines += [f"    warning: {text}" for text in outcome.warnings]
    return "\n".join(lines)


def _break_even(point: BreakEven | None) -> str:
    if point is None:
        return "unknown: it takes the laws of both"
    if point.interval is None:
        return f"{point.says} (interval unknown)"
    low, high = ("never" if math.isinf(end) else f"{end:.2g}" for end in point.interval)
    return f"{point.says} (interval {low} to {high})"


def _finite(value: Any) -> Any:
    """Replaces infinite values by null, so that every reader of JSON accepts them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(question: Question, curves: dict[Way, Curve], found: Plan) -> Any:
    """Draws loss against D2, with bands where there are draws, dotted outside the range of the fit."""
    import numpy as np

    from moe.scaling_laws.ways import columns_of, loss_at, paid_by, tokens_of
    from recipes.tracking.report.canvas import label_lines, new_figure, note, style
    from recipes.tracking.report.colours import LIGHT

    budget = tokens_of(question, "upcycle")
    grid = np.geomspace(budget / 100, budget * 30, 240)
    figure = new_figure(4.2, LIGHT)
    axes = figure.subplots()
    colours = {"upcycle": LIGHT.moe, "scratch": LIGHT.dense, "continue": LIGHT.cpt}
    labels = []
    for way, curve in curves.items():
        tokens = paid_by(question, way, grid)
        loss = loss_at(question, way, curve, tokens)
        asked = np.asarray(columns_of(question, way, curve.law, tokens)["tokens"])
        low, high = curve.ranges.get("tokens", (0.0, math.inf))
        inside = (asked >= low) & (asked <= high)
        axes.plot(grid, loss, color=colours[way], linewidth=1.4, linestyle=":")
        axes.plot(grid, np.where(inside, loss, np.nan), color=colours[way], linewidth=2)
        if curve.draws is not None:
            tail = (1 - curve.level) / 2
            drawn = loss_at(question, way, curve, tokens, draws=True)
            band = np.quantile(drawn, [tail, 1 - tail], axis=0)
            axes.fill_between(grid, *band, color=colours[way], alpha=0.18, linewidth=0)
        labels.append((float(loss[-1]), NAMES[way], colours[way]))
    axes.set_xscale("log")
    axes.axvline(budget, color=LIGHT.muted, linewidth=1)
    point = found.upcycle_against_scratch
    if point is not None and point.tokens is not None and grid[0] < point.tokens < grid[-1]:
        axes.axvline(point.tokens, color=LIGHT.moe, linewidth=1, linestyle="--")
    style(axes, LIGHT, "tokens after the conversion, D2", "predicted loss")
    label_lines(axes, labels)
    bands = (
        "bands: bootstrap" if any(curve.draws is not None for curve in curves.values()) else "spread unknown"
    )
    note(axes, f"dotted: outside of the tokens of the fit; grey: the budget; dashed: D2*; {bands}", LIGHT)
    return figure


if __name__ == "__main__":
    run_command(main)
