"""Fits scaling laws to a table of runs: ``python -m tools.fit_laws --help``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.command import check_json_target, log_beside, run_command, tool_parser, write_json

if TYPE_CHECKING:
    from moe.errors import Mistake
    from moe.scaling_laws.base import Law
    from moe.scaling_laws.columns import Runs
    from moe.scaling_laws.fit import Fit, FitOptions


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "fit_laws",
        "Fits a scaling law to a table of runs: Huber loss on the logarithm, many starts, "
        "L-BFGS, bootstrap intervals. docs/scaling_laws.md explains laws and columns.",
        example="runs.csv --law chinchilla --figure fit.png --json fit.json",
    )
    add = parser.add_argument
    add("runs", nargs="?", metavar="RUNS.csv", help="table with a line for each run, and a header")
    add("--law", metavar="NAME", help="name of the law; see --list")
    add("--list", action="store_true", help="print the laws, their inputs and published coefficients")
    add("--bootstrap", type=int, default=200, metavar="B", help="resamplings, 0 for none")
    add("--level", type=float, default=0.95, help="probability of the intervals")
    add("--delta", type=float, default=1e-3, help="Huber's delta, of ln loss")
    add("--starts", type=int, default=128, help="starting points, at least 4")
    add("--seed", type=int, default=0, help="seed of starts and resamplings")
    add("--figure", metavar="PNG", help="draw predicted against measured losses")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Fits or lists the laws and returns 0.

    Raises:
        UserError: The flags or the runs have mistakes.
    """
    args = build_parser().parse_args(argv)
    # Before numpy is loaded: on matrices this small, the threads of BLAS cost more than they bring.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from moe.errors import UserError
    from moe.scaling_laws import laws

    log = log_beside(args.json)
    if args.list:
        log("\n\n".join(describe(law) for law in laws().values()))
        return 0
    known = laws()
    if mistakes := _flag_mistakes(args, known):
        raise UserError(mistakes)
    from moe.scaling_laws.columns import parse_runs
    from moe.scaling_laws.fit import FitOptions, fit_law
    from moe.scaling_laws.record import fit_record
    from recipes.tracking.report.canvas import write_png

    runs = parse_runs(read_text(args.runs, "RUNS.csv"), args.runs)
    options = FitOptions(args.delta, args.starts, bootstrap=args.bootstrap, level=args.level, seed=args.seed)
    fit = fit_law(known[args.law], runs, options)
    log(summary(fit, runs, options))
    if args.figure:
        write_png(_figure(fit, runs), Path(args.figure))
        log(f"figure: {args.figure}")
    write_json(args.json, fit_record(fit, args.runs))
    return 0


def read_text(path: str, what: str) -> str:
    """Reads the text of a file that a user named.

    Raises:
        DataError: It cannot be read.
    """
    from moe.errors import DataError

    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError.one(what, path, f"cannot be read: {cause}", "Check the path.") from error


def _flag_mistakes(args: argparse.Namespace, known: dict[str, Law]) -> list[Mistake]:
    from moe.errors import Mistake

    mistakes = check_json_target(args.json) + check_figure_target(args.figure)
    if args.runs is None:
        mistakes.append(Mistake("RUNS.csv", None, "a table of runs is needed", "Name one, or give --list."))
    if args.law not in known:
        rule = "there is no such law" if args.law else "a law is needed"
        mistakes.append(Mistake("--law", args.law, rule, f"Choose one of {', '.join(known)}."))
    for flag, value, is_fine, rule in (
        (
            "--bootstrap",
            args.bootstrap,
            args.bootstrap == 0 or args.bootstrap >= 20,
            "it must be 0, or 20 or more",
        ),
        ("--level", args.level, 0 < args.level < 1, "it must be between 0 and 1"),
        ("--delta", args.delta, 0 < args.delta < 1, "it must be between 0 and 1"),
        ("--starts", args.starts, args.starts >= 4, "it must be 4 or more"),
        ("--seed", args.seed, args.seed >= 0, "it must be 0 or more"),
    ):
        if not is_fine:
            mistakes.append(Mistake(flag, value, rule, "Change it, or leave it out."))
    return mistakes


def check_figure_target(target: str | None) -> list[Mistake]:
    """Checks the value of a ``--figure`` flag."""
    from moe.errors import Mistake

    if target is None or (target.endswith(".png") and not Path(target).is_dir()):
        return []
    return [Mistake("--figure", target, "it must be a file that ends in .png", "Name one.")]


def describe(law: Law) -> str:
    """Describes a law with its inputs, coefficients and published values."""
    from moe.scaling_laws.columns import COLUMNS

    lines = [f"{law.name}: {law.formula}", f"  {law.source}", "  columns: loss, and"]
    lines += [f"    {name:14} {COLUMNS[name].meaning} ({law.inputs[name]})" for name in law.inputs]
    lines.append("  coefficients:")
    lines += [f"    {parameter.name:14} {parameter.meaning}" for parameter in law.parameters]
    for preset in law.presets:
        values = ", ".join(f"{name} {value:g}" for name, value in preset.coefficients.items())
        lines += [f"  preset {preset.name}: {preset.source}", f"    {values}", f"    for: {preset.holds_for}"]
        spans = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in preset.ranges.items())
        lines += [f"    range: {spans or 'not known'}"]
        lines += [f"    caution: {preset.caution}"] if preset.caution else []
    return "\n".join(lines)


def summary(fit: Fit, runs: Runs, options: FitOptions) -> str:
    """Formats a fit as a table."""
    lines = [f"{fit.law.name}: {fit.law.formula}", f"{fit.count} runs of {runs.path}"]
    if runs.ignored:
        lines.append(f"columns not known, ignored: {', '.join(runs.ignored)}")
    if unused := sorted(set(runs.columns) - {"loss", *fit.law.inputs}):
        lines.append(f"columns that this law does not read: {', '.join(unused)}")
    span = (
        f"{100 * fit.level:g} % interval ({options.bootstrap} bootstraps)"
        if fit.intervals
        else "no bootstrap"
    )
    lines.append(f"\n  {'':10}{'value':>13}   {span}")
    for name, value in fit.coefficients.items():
        ends = "" if fit.intervals is None else "{:.5g} to {:.5g}".format(*fit.intervals[name])
        mark = "  NOT DETERMINED" if name in fit.undetermined else ""
        lines.append(f"  {name:10}{value:13.6g}   {ends}{mark}")
    held = "not measured" if fit.held_out_rmse is None else f"{fit.held_out_rmse:.3g}"
    lines.append(f"\nerror of ln loss (RMSE): {fit.rmse:.3g}; on the runs of lowest loss, held out: {held}")
    lines.append(f"starts taken to the end that agree: {100 * fit.agreeing_starts:.0f} %")
    lines += [f"warning: {name} is not determined: {why}" for name, why in fit.undetermined.items()]
    return "\n".join([*lines, *(f"note: {text}" for text in fit.notes)])


def _figure(fit: Fit, runs: Runs) -> Any:
    """Draws predicted against measured losses, and the residuals."""
    import numpy as np

    from recipes.tracking.report.canvas import new_figure, note, style
    from recipes.tracking.report.colours import LIGHT

    figure = new_figure(3.8, LIGHT)
    left, right = figure.subplots(1, 2)
    measured = runs.columns["loss"]
    predicted = measured * np.exp(fit.residuals)
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    left.plot(ends, ends, color=LIGHT.muted, linewidth=1)
    left.scatter(measured, predicted, s=12, color=LIGHT.moe, linewidths=0)
    style(left, LIGHT, "measured loss", "predicted loss")
    note(left, f"{fit.law.name}, {fit.count} runs; on the line is right", LIGHT)
    right.axhline(0, color=LIGHT.muted, linewidth=1)
    right.scatter(measured, 100 * fit.residuals, s=12, color=LIGHT.moe, linewidths=0)
    style(right, LIGHT, "measured loss", "predicted over measured, %")
    note(right, f"RMSE {100 * fit.rmse:.2g} %; a slope here means the law is the wrong one", LIGHT)
    return figure


if __name__ == "__main__":
    run_command(main)
