"""Plans and checks as figures for programs and as tables for readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe.planning.assumptions import FITTED, Assumptions
from moe.planning.fit_efficiency import Check, spread
from moe.planning.layout import Job
from moe.planning.plan_layouts import Plan
from moe.planning.published import NOT_EXPRESSED

_GIB = 2**30
_TIMES = ("products", "memory", "launch", "exchange", "tensor", "pipeline", "bubble", "data", "optimizer")


def figures_of(plan: Plan) -> dict[str, Any]:
    """Returns a plan's figures for programs: bytes, seconds, and rates."""
    layout, gpus = plan.layout, plan.cluster.gpus
    return {
        "layout": vars(layout)
        | {
            "data": layout.data(gpus),
            "expert_replicas": layout.expert_replicas(gpus),
            "accumulation": layout.accumulation(plan.job, gpus),
        },
        "fits": plan.fits,
        "memory_bytes": vars(plan.memory) | {"total": plan.memory.total},
        "seconds": vars(plan.time) | {"step": plan.time.total},
        "tokens_per_s_per_gpu": plan.tokens_per_gpu,
        "tflops_per_gpu": plan.flops_per_gpu / 1e12,
        "mfu": plan.mfu,
    }


def job_figures(job: Job, plan: Plan) -> dict[str, Any]:
    """Returns the figures of the job and the GPU."""
    gpu = plan.cluster.gpu
    return {
        "sequence_length": job.seq_len,
        "global_batch": job.global_batch,
        "precision": job.precision,
        "gpus": plan.cluster.gpus,
        "gpu": vars(gpu) | {"low": {str(bits): rate for bits, rate in gpu.low.items()}},
    }


def plan_lines(plans: Sequence[Plan], found: int, tried: int) -> Iterator[str]:
    """Yields the table of the fastest plans.

    Args:
        plans: Plans to show, fastest first; at least one.
        found: Number of layouts that fit.
        tried: Number of all layouts.
    """
    gpu = plans[0].cluster.gpu
    yield f"{found} of {tried} layouts fit in {gpu.memory / _GIB:.1f} GiB of {gpu.name}"
    yield ""
    yield (
        f"{'':3}{'layout':28}{'mb':>3}{'acc':>5} {'recompute':10}{'sharding':10}{'step s':>8}"
        f"{'tok/s/GPU':>11}{'TFLOP/s':>9}{'MFU':>6}{'GiB':>7}"
    )
    for number, plan in enumerate(plans, 1):
        layout = plan.layout
        label = f"{layout.label} DP{layout.data(plan.cluster.gpus)}"
        yield (
            f"{number:<3}{label:28}{layout.micro_batch:3}"
            f"{layout.accumulation(plan.job, plan.cluster.gpus):5} {layout.recompute:10}{layout.sharding:10}"
            f"{plan.time.total:8.3f}{plan.tokens_per_gpu:11,.0f}{plan.flops_per_gpu / 1e12:9.0f}"
            f"{plan.mfu:6.1%}{plan.memory.total / _GIB:7.1f}"
        )
    yield ""
    yield "share of the step in %"
    yield f"{'':3}" + "".join(f"{name:>11}" for name in _TIMES)
    for number, plan in enumerate(plans, 1):
        shares = (getattr(plan.time, name) / plan.time.total for name in _TIMES)
        yield f"{number:<3}" + "".join(f"{100 * share:11.1f}" for share in shares)
    yield ""
    yield "GiB of the fullest GPU"
    names = tuple(vars(plans[0].memory))
    yield f"{'':3}" + "".join(f"{name:>13}" for name in names)
    for number, plan in enumerate(plans, 1):
        yield f"{number:<3}" + "".join(f"{getattr(plan.memory, name) / _GIB:13.1f}" for name in names)


def check_figures(checks: Sequence[Check], assumed: Assumptions) -> dict[str, Any]:
    """Returns the figures of the published rows for programs."""
    return {
        "rows": [
            {
                "release": check.row.release,
                "model": check.row.model,
                "gpu": check.row.gpu,
                "gpus": check.row.gpus,
                "precision": check.row.precision,
                "published": {
                    "tokens_per_s_per_gpu": check.row.tokens,
                    "tflops_per_gpu": check.row.tflops,
                    "tflop_per_token": check.row.tflops / check.row.tokens,
                },
                "predicted": figures_of(check.plan),
                "error": check.error,
                "error_without_the_row": check.left_out,
                "error_without_the_model": check.family_out,
            }
            for check in checks
        ],
        "errors": _errors(checks),
        "errors_newest": _errors([check for check in checks if check.row.release == checks[0].row.release]),
        "does_not_fit": [check.row.name for check in checks if not check.plan.fits],
        "not_expressed": dict(NOT_EXPRESSED),
        "parameters": vars(assumed) | {"fitted": list(FITTED)},
    }


def _errors(checks: Sequence[Check]) -> dict[str, dict[str, float]]:
    return {
        "all_rows_fitted": spread([check.error for check in checks]),
        "row_left_out": spread([check.left_out for check in checks]),
        "model_left_out": spread([check.family_out for check in checks]),
    }


def check_lines(checks: Sequence[Check], assumed: Assumptions) -> Iterator[str]:
    """Yields the table of the published rows."""
    yield (
        f"{'':8} {'':38}{'':27}{'tokens/s/GPU':^18}{'TFLOP/s/GPU':^14}{'error in %, fitted to':^24}"
        f"{'GiB of':>16}"
    )
    yield (
        f"{'release':8} {'row':38}{'layout':27}{'published':>9}{'model':>9}{'publ.':>7}{'model':>7}"
        f"{'all':>8}{'others':>8}{'models':>8}{'model':>10}{'GPU':>6}"
    )
    for check in checks:
        row, plan = check.row, check.plan
        yield (
            f"{row.release:8} {row.name:38}{row.layout.label:27}{row.tokens:9.0f}{plan.tokens_per_gpu:9.0f}"
            f"{row.tflops:7.0f}{plan.flops_per_gpu / 1e12:7.0f}{100 * check.error:+8.1f}"
            f"{100 * check.left_out:+8.1f}{100 * check.family_out:+8.1f}{plan.memory.total / _GIB:10.1f}"
            f"{plan.cluster.gpu.memory / _GIB:6.0f}{'' if plan.fits else '  DOES NOT FIT'}"
        )
    yield ""
    newest = [check for check in checks if check.row.release == checks[0].row.release]
    for title, rows in ((f"all {len(checks)} rows", checks), (f"the {len(newest)} newest", newest)):
        for name, sizes in _errors(rows).items():
            shown = ", ".join(f"{key} {100 * size:.1f} %" for key, size in sizes.items())
            yield f"{title + ', ' + name.replace('_', ' '):38} {shown}"
    missing = [check.row.name for check in checks if not check.plan.fits]
    yield f"layouts predicted not to fit: {', '.join(missing) or 'none'}"
    yield "fitted, few parameters for all rows: " + ", ".join(
        f"{name} {getattr(assumed, name):.3g}" for name in FITTED
    )
    for name, reason in NOT_EXPRESSED.items():
        yield f"not among them: {name}: {reason}"
