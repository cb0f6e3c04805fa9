"""Errors with advice for jobs of which no layout fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moe.accounting.memory import ElementBytes
from moe.errors import ConfigError
from moe.planning.assumptions import Assumptions
from moe.planning.blocks import model_of
from moe.planning.cluster import GPUS, Cluster
from moe.planning.layout import Job, Layout, enumerate_layouts
from moe.planning.plan_layouts import Plan, make_plan

_GIB = 2**30
_TIMES = (2, 4, 8, 16, 32)


def least_memory(job: Job, cluster: Cluster, assumed: Assumptions, sizes: ElementBytes) -> Plan | None:
    """Returns the plan with the least memory of all layouts; None if the job has no layout."""
    model = model_of(job.shape, job.seq_len)
    plans = (make_plan(layout, job, cluster, assumed, sizes, model) for layout in _small(job, cluster))
    return min(plans, key=lambda plan: plan.memory.total, default=None)


def _small(job: Job, cluster: Cluster) -> Iterator[Layout]:
    """Yields candidates for the layout with the least memory: one sequence at a time, full recomputation."""
    for layout in enumerate_layouts(job, cluster, recompute=("full",), micro_batches=(1,)):
        if layout.chunks == 1:
            yield layout


def no_fit_error(job: Job, cluster: Cluster, assumed: Assumptions, sizes: ElementBytes) -> ConfigError:
    """Returns the error for a job of which no layout fits: the excess, its parts, and remedies."""
    best = least_memory(job, cluster, assumed, sizes)
    if best is None:
        rule = f"{job.global_batch} sequences cannot be laid out over {cluster.gpus} GPUs in any way"
        remedy = "Set a global batch and a number of GPUs with common divisors, such as powers of two."
        return ConfigError.one("--gpus", cluster.gpus, rule, remedy)
    memory, there = best.memory, cluster.gpu.memory
    parts = ", ".join(f"{name} {value / _GIB:.1f}" for name, value in vars(memory).items())
    sharded = f"{best.layout.label} with full recomputation, sharding={best.layout.sharding}"
    rule = (
        f"no layout fits in {there / _GIB:.1f} GiB a GPU: the smallest, {sharded}, needs "
        f"{memory.total / _GIB:.1f} GiB, {(memory.total - there) / _GIB:.1f} too many ({parts})"
    )
    return ConfigError.one("--gpus", cluster.gpus, rule, _remedy(job, cluster, assumed, sizes))


def fixed_axes_error(plans: Sequence[Plan], fixed: Sequence[str]) -> ConfigError:
    """Returns the error for a job of which no layout with the fixed axes fits; others may."""
    shown, remedy = " ".join(fixed), "Change it, or leave it out to try every layout."
    if not plans:
        return ConfigError.one("--only", shown, "the job has no such layout over these GPUs", remedy)
    best = min(plans, key=lambda plan: plan.memory.total)
    rule = (
        f"none of the {len(plans)} layouts with it fits: the smallest, {best.layout.label}, needs "
        f"{best.memory.total / _GIB:.1f} GiB of {best.cluster.gpu.memory / _GIB:.1f}"
    )
    return ConfigError.one("--only", shown, rule, remedy)


def _remedy(job: Job, cluster: Cluster, assumed: Assumptions, sizes: ElementBytes) -> str:
    found = []
    for times in _TIMES:
        more = Cluster(cluster.gpu, cluster.gpus * times)
        batch = job.global_batch if job.global_batch >= more.gpus else more.gpus
        if _fits(replace(job, global_batch=batch), more, assumed, sizes):
            grown = "" if batch == job.global_batch else f" with --global-batch {batch}"
            found.append(f"--gpus {more.gpus}{grown}")
            break
    larger = sorted((gpu for gpu in GPUS.items() if gpu[1].memory > cluster.gpu.memory), key=_by_memory)
    for name, gpu in larger:
        offers = job.precision == "bf16" or 4 in gpu.low or (8 in gpu.low and job.precision != "nvfp4")
        if offers and _fits(job, Cluster(gpu, cluster.gpus), assumed, sizes):
            found.append(f"--gpu {name}")
            break
    half = ElementBytes(gradients=2, optimizer=4)
    if (sizes.gradients, sizes.optimizer) != (2, 4) and _fits(job, cluster, assumed, half):
        found.append("--gradient-bytes 2 --optimizer-bytes 4 (16-bit gradients and moments)")
    if job.seq_len > 1024 and _fits(replace(job, seq_len=job.seq_len // 2), cluster, assumed, sizes):
        found.append(f"--sequence-length {job.seq_len // 2}")
    if not found:
        return f"Not even {_TIMES[-1]} times the GPUs would suffice: choose a smaller model."
    return f"Each of these would suffice: {'; '.join(found)}."


def _by_memory(item: tuple[str, object]) -> float:
    return GPUS[item[0]].memory


def _fits(job: Job, cluster: Cluster, assumed: Assumptions, sizes: ElementBytes) -> bool:
    model = model_of(job.shape, job.seq_len)
    return any(make_plan(layout, job, cluster, assumed, sizes, model).fits for layout in _small(job, cluster))
