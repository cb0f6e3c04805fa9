"""Plans training on a cluster, from layouts that fit to their speed: ``python -m tools.plan --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tools.command import (
    check_json_target,
    check_least,
    check_positive,
    log_beside,
    read_config,
    run_command,
    tool_parser,
    write_json,
)

if TYPE_CHECKING:
    from moe.errors import Mistake
    from moe.planning.cluster import Cluster
    from moe.planning.layout import Layout

_GIGA, _GIB = 1e9, 2**30
_AXES = {
    "EP": "expert",
    "TP": "tensor",
    "PP": "pipeline",
    "VP": "chunks",
    "CP": "context",
    "MB": "micro_batch",
}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "plan",
        "Lists the layouts of a training job (expert, tensor, pipeline, context and data "
        "parallelism, micro-batch, recomputation) that fit a cluster, fastest first, with memory of a GPU "
        "and time of a step by what it goes to. A model on paper: docs/plan.md has its formulas and "
        "--check-published its errors. No weights are read and no GPU is needed.",
        example="MODEL --gpu h100 --gpus 64 --dtype bf16 --top 5",
        reads_weights=False,
    )
    add = parser.add_argument
    add(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="config.json, its folder, or the name of a published model",
    )
    add("--gpu", default="h100", metavar="KIND", help="kind of GPU")
    add("--gpus", type=int, default=8, metavar="N", help="number of GPUs")
    add("--dtype", default="bf16", help="bf16, fp8, mxfp8 or nvfp4")
    add("--sequence-length", type=int, default=4096, metavar="N", help="tokens of a sequence")
    add("--global-batch", type=int, default=512, metavar="N", help="sequences of a step")
    add("--memory-gib", type=float, metavar="GIB", help="memory of a GPU, instead of its kind's")
    add("--domain", type=int, metavar="N", help="GPUs joined by NVLink, instead of the kind's")
    add(
        "--nvlink", type=float, metavar="GB/s", help="NVLink of a GPU in one direction, instead of the kind's"
    )
    add("--network", type=float, metavar="GB/s", help="network of a GPU in one direction, likewise")
    add("--only", nargs="+", default=[], metavar="AXIS=N", help=f"fix an axis: {', '.join(_AXES)}")
    add("--overlap", action="store_true", help="the engine hides the exchange of experts behind products")
    add("--graphed", action="store_true", help="the engine runs a step as one CUDA graph")
    add("--gradient-bytes", type=int, default=4, metavar="B", help="bytes of a gradient")
    add("--optimizer-bytes", type=int, default=8, metavar="B", help="bytes of the optimizer's states")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="set parameters of docs/plan.md",
    )
    add("--top", type=int, default=10, metavar="N", help="layouts to show")
    add("--check-published", action="store_true", help="compare with published speeds (about a minute)")
    add("--fit", action="store_true", help="fit the parameters to the published rows and print them")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the plan, or the check against published speeds, and returns 0.

    Raises:
        ConfigError: A flag or the config cannot be used, or no layout fits.
    """
    args = build_parser().parse_args(argv)
    log = log_beside(args.json)
    work = _published if args.check_published or args.fit else _plan
    figures = work(args, log)
    write_json(args.json, figures)
    return 0


def _published(args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    from moe.errors import ConfigError
    from moe.planning.assumptions import FITTED, Assumptions, with_settings
    from moe.planning.fit_efficiency import Fit, refit
    from moe.planning.plan_table import check_figures, check_lines
    from moe.planning.published import as_measured, published_rows

    if mistakes := check_json_target(args.json):
        raise ConfigError(mistakes)
    rows, assumed = published_rows(), as_measured(with_settings(Assumptions(), args.settings))
    if args.fit:
        fitted = refit(rows, assumed)
        values = {name: getattr(fitted, name) for name in FITTED}
        for name, value in values.items():
            log(f"{name:16}{value:10.4g}   (set: {getattr(assumed, name):.4g})")
        return values
    tell = partial(print, end="\r", file=sys.stderr, flush=True) if sys.stderr.isatty() else lambda line: None
    checks = Fit(rows, assumed).check(tell)
    for line in check_lines(checks, assumed):
        log(line)
    return check_figures(checks, assumed)


def _plan(args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    from moe.accounting.memory import ElementBytes
    from moe.accounting.shape import shape_from_config
    from moe.planning.advice import fixed_axes_error, no_fit_error
    from moe.planning.assumptions import Assumptions, with_settings
    from moe.planning.blocks import model_of
    from moe.planning.layout import Job, Layout, enumerate_layouts
    from moe.planning.plan_layouts import fastest, make_plan
    from moe.planning.plan_table import figures_of, job_figures, plan_lines

    content, cluster, only = _read(args)
    assumed = with_settings(Assumptions(), args.settings)
    cluster.gpu.peak(args.dtype)
    job = Job(shape_from_config(content), args.sequence_length, args.global_batch, args.dtype)
    sizes = ElementBytes(gradients=args.gradient_bytes, optimizer=args.optimizer_bytes)
    base = Layout(overlap=args.overlap, graphed=args.graphed)
    model = model_of(job.shape, job.seq_len)
    layouts = [one for one in enumerate_layouts(job, cluster, base=base) if _matches(one, only)]
    plans = [make_plan(one, job, cluster, assumed, sizes, model) for one in layouts]
    fitting = fastest(plans)
    if not fitting:
        raise fixed_axes_error(plans, args.only) if only else no_fit_error(job, cluster, assumed, sizes)
    for line in plan_lines(fitting[: args.top], len(fitting), len(layouts)):
        log(line)
    return {
        "job": job_figures(job, fitting[0]),
        "parameters": vars(assumed),
        "tried": len(layouts),
        "fit": len(fitting),
        "plans": [figures_of(plan) for plan in fitting[: args.top]],
    }


def _matches(layout: Layout, only: Mapping[str, int]) -> bool:
    return all(getattr(layout, name) == value for name, value in only.items())


def _read(args: argparse.Namespace) -> tuple[Mapping[str, Any], Cluster, dict[str, int]]:
    """Returns the config's content, the cluster and the fixed axes once all flags are checked."""
    from moe.errors import ConfigError, Mistake
    from moe.planning.cluster import GPUS, PRECISIONS, Cluster

    mistakes = check_json_target(args.json)
    ones = ("gpus", "sequence_length", "global_batch", "gradient_bytes", "optimizer_bytes", "top")
    mistakes += check_least(args, **dict.fromkeys(ones, 1))
    mistakes += check_positive(args, "memory_gib", "domain", "nvlink", "network")
    if args.dtype not in PRECISIONS:
        remedy = f"Choose of {', '.join(PRECISIONS)}."
        mistakes.append(Mistake("--dtype", args.dtype, "it is not known", remedy))
    if args.gpu not in GPUS:
        mistakes.append(Mistake("--gpu", args.gpu, "it is not known", f"Choose of {', '.join(GPUS)}."))
    only = _fixed_axes(args.only, mistakes)
    content = _content(args.config, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    gpu = GPUS[args.gpu]
    changed = {
        "memory": args.memory_gib and args.memory_gib * _GIB,
        "domain": args.domain,
        "nvlink": args.nvlink and args.nvlink * _GIGA,
        "network": args.network and args.network * _GIGA,
    }
    gpu = replace(gpu, **{name: value for name, value in changed.items() if value is not None})
    return content, Cluster(gpu, args.gpus), only


def _fixed_axes(given: list[str], mistakes: list[Mistake]) -> dict[str, int]:
    from moe.errors import Mistake

    only = {}
    for setting in given:
        name, _, text = setting.partition("=")
        if name.upper() in _AXES and text.isdigit() and int(text) > 0:
            only[_AXES[name.upper()]] = int(text)
        else:
            remedy = f"Give one of {', '.join(_AXES)}, = and a number above 0, such as EP=8."
            mistakes.append(Mistake("--only", setting, "it names no axis and its size", remedy))
    return only


def _content(config: str | None, mistakes: list[Mistake]) -> Mapping[str, Any]:
    """Returns the content of the config; empty where it cannot be read."""
    from moe.errors import Mistake
    from moe.planning.published import CONFIGS

    known = f"Give a config.json, its folder, or one of {', '.join(CONFIGS)}."
    if config is None:
        mistakes.append(Mistake("CONFIG", None, "a model is needed", known))
        return {}
    if config in CONFIGS:
        return CONFIGS[config]
    content, unread = read_config(config, known)
    mistakes += unread
    return content


if __name__ == "__main__":
    run_command(main)
