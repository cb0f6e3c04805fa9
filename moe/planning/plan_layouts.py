"""Plans: a layout with its memory and time, and the fitting layouts of a job, fastest first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moe.accounting.flops import flops_from_shape
from moe.accounting.memory import ElementBytes
from moe.planning.assumptions import Assumptions
from moe.planning.blocks import Blocks, Model, model_of
from moe.planning.cluster import Cluster
from moe.planning.layout import Job, Layout, Setting
from moe.planning.layout_memory import Memory, rank_memory
from moe.planning.pipeline_stages import stages_of
from moe.planning.time import StepTime, block_time, step_time

#: fp32 master weights, gradients and AdamW's moments.
PLAIN_SIZES = ElementBytes()


@dataclass(frozen=True)
class Plan:
    """Layout with its costs.

    Attributes:
        layout: Layout over ranks.
        memory: Memory of the fullest rank.
        time: Time of a step.
        job: The job.
        cluster: The cluster.
    """

    layout: Layout
    memory: Memory
    time: StepTime
    job: Job = field(repr=False)
    cluster: Cluster = field(repr=False)

    @property
    def fits(self) -> bool:
        """True if a GPU has its memory."""
        return self.memory.total <= self.cluster.gpu.memory

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.job.global_batch * self.job.seq_len / self.time.total / self.cluster.gpus

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of a GPU under the ``megatron`` convention, without recomputation."""
        return self.tokens_per_gpu * flops_from_shape(self.job.shape, self.job.seq_len, "megatron").training

    @property
    def mfu(self) -> float:
        """Share of the peak at the job's precision."""
        return self.flops_per_gpu / self.cluster.gpu.peak(self.job.precision)


def make_plan(
    layout: Layout,
    job: Job,
    cluster: Cluster,
    assumed: Assumptions | None = None,
    sizes: ElementBytes = PLAIN_SIZES,
    model: Model | None = None,
) -> Plan:
    """Computes memory and time of one layout, fitting or not.

    Stages are cut for speed; if that does not fit but equally many blocks per stage do, these are used.

    Args:
        layout: A layout without `moe.planning.layout.layout_mistakes`.
        job: The job.
        cluster: The cluster.
        assumed: Parameters; the defaults if None.
        sizes: Bytes per element of master weights, gradients and optimizer states.
        model: The job's model as blocks, if many layouts share it.
    """
    assumed = assumed or Assumptions()
    setting = Setting(layout, job, cluster, assumed)
    model = model or model_of(job.shape, job.seq_len)
    stages, seconds = timed(setting, sizes, model)
    memory = rank_memory(stages, setting, sizes)
    plan = Plan(layout, memory, seconds, job, cluster)
    if plan.fits or layout.pipeline == 1:
        return plan
    stages, seconds = timed(setting, sizes, model, alike=True)
    memory = rank_memory(stages, setting, sizes)
    other = Plan(layout, memory, seconds, job, cluster)
    return other if other.fits else plan


def timed(
    setting: Setting, sizes: ElementBytes, model: Model, *, alike: bool = False
) -> tuple[list[Blocks], StepTime]:
    """Computes the blocks of each stage, and the time of a step.

    Args:
        setting: Layout, job, cluster and parameters.
        sizes: Bytes per element of master weights, gradients and optimizer states.
        model: The model as blocks.
        alike: Gives stages equally many blocks, embedding and head included; else minimises the largest cost
            of a stage.
    """
    layout = setting.layout
    times = {id(block): block_time(block, setting) for block in model.kinds}
    costs = [1.0 if alike else times[id(block)].total for block in model.kinds]
    stages = stages_of(model, costs, layout.pipeline, layout.chunks)
    return stages, step_time(stages, times, setting, sizes)


def fastest(plans: Iterable[Plan], most: int | None = None) -> list[Plan]:
    """Returns the plans that fit, fastest first, ties by memory."""
    fitting = [plan for plan in plans if plan.fits]
    return sorted(fitting, key=lambda plan: (plan.time.total, plan.memory.total))[:most]
