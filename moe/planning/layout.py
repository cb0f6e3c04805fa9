"""Layouts of a job over a cluster, and their enumeration.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from moe.accounting.layers import ModelShape
from moe.accounting.mixers import AttentionShape, LatentAttentionShape
from moe.errors import Mistake
from moe.planning.assumptions import Assumptions
from moe.planning.cluster import Cluster, Precision

Recompute = Literal["none", "selective", "full"]
Sharding = Literal["none", "optimizer", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
SHARDING: tuple[Sharding, ...] = get_args(Sharding)

# Shorter sequences are not cut over ranks.
LONG = 16384


@dataclass(frozen=True)
class Job:
    """Training job.

    Attributes:
        shape: Shape of the model.
        seq_len: Tokens of a sequence.
        global_batch: Sequences of a step.
        precision: Precision of the products.
    """

    shape: ModelShape
    seq_len: int
    global_batch: int
    precision: Precision = "bf16"


@dataclass(frozen=True)
class Layout:
    """Division of the work over ranks, which count through ``tensor``, ``context``, data, then ``pipeline``.

    Whole experts (never cut by ``tensor``) are distributed over neighbouring ranks of a pipeline stage.

    Attributes:
        tensor: Ranks over which every matrix outside routed experts is cut, sequence parallel.
        context: Ranks over which every sequence is cut.
        pipeline: Stages.
        chunks: Parts of a stage that take turns (interleaved schedule); 1 for a plain schedule.
        expert: Ranks that together hold the experts of a layer.
        micro_batch: Sequences of a micro-batch.
        recompute: ``selective`` recomputes norms, activation functions and the up-projections of latent
            attention in backward, ``full`` every block.
        sharding: State cut over data-parallel ranks: none, master weights and optimizer states
            (``optimizer``), or also weights and gradients, gathered layer by layer (``full``).
        overlap: Overlaps the exchange of experts with another micro-batch's products.
        graphed: Runs the whole step as one graph on the device, without launches by the host.
        offloaded: Layers of a rank whose activations are offloaded to the host's memory.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    expert: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"
    sharding: Sharding = "optimizer"
    overlap: bool = False
    graphed: bool = False
    offloaded: int = 0

    def data(self, gpus: int) -> int:
        """Returns the data-parallel replicas."""
        return gpus // (self.tensor * self.context * self.pipeline)

    def replicas(self, gpus: int) -> int:
        """Returns the ranks that hold the same weights outside routed experts."""
        return self.data(gpus) * self.context

    def expert_replicas(self, gpus: int) -> int:
        """Returns the ranks that hold the same experts."""
        return gpus // (self.pipeline * self.expert)

    def accumulation(self, job: Job, gpus: int) -> int:
        """Returns the micro-batches of a replica in a step."""
        return job.global_batch // (self.micro_batch * self.data(gpus))

    @property
    def label(self) -> str:
        """Label in tables."""
        parts = [f"EP{self.expert}", f"TP{self.tensor}", f"PP{self.pipeline}"]
        if self.chunks > 1:
            parts.append(f"VP{self.chunks}")
        if self.context > 1:
            parts.append(f"CP{self.context}")
        return " ".join(parts)


@dataclass(frozen=True)
class Setting:
    """Layout of a job over a cluster, with the parameters of the model of time and memory."""

    layout: Layout
    job: Job
    cluster: Cluster
    assumed: Assumptions


def layout_mistakes(layout: Layout, job: Job, cluster: Cluster) -> list[Mistake]:
    """Lists why the job cannot have this layout, whatever its memory."""
    found: list[Mistake] = []

    def add(path: str, value: object, rule: str, remedy: str) -> None:
        found.append(Mistake(path, value, rule, remedy))

    gpus, cut = cluster.gpus, layout.tensor * layout.context * layout.pipeline
    if gpus % cut:
        add("layout", layout.label, f"{gpus} GPUs do not divide by TP x CP x PP = {cut}", "Choose divisors.")
        return found
    stage = gpus // layout.pipeline
    if stage % layout.expert:
        rule = f"the {stage} GPUs of a stage do not divide by it"
        add("expert", layout.expert, rule, f"Choose a divisor of {stage}.")
    for experts in sorted({ffn.num_experts for ffn in job.shape.moe} or {1}):
        if experts % layout.expert:
            add("expert", layout.expert, f"{experts} experts do not divide by it", "Choose a divisor.")
    per_step = layout.micro_batch * layout.data(gpus)
    if job.global_batch % per_step:
        rule = f"{layout.data(gpus)} replicas of this micro-batch do not divide {job.global_batch} sequences"
        add("micro_batch", layout.micro_batch, rule, "Choose another global batch.")
    elif layout.chunks > 1 and layout.accumulation(job, gpus) % layout.pipeline:
        rule = "interleaved stages need a multiple of PP micro-batches"
        add("chunks", layout.chunks, rule, "Choose 1, or a larger global batch.")
    if layout.chunks > 1 and layout.pipeline == 1:
        add("chunks", layout.chunks, "a single stage has no turns", "Choose 1.")
    blocks = len(job.shape.layers) + job.shape.next_token_layers + 2
    if layout.pipeline * layout.chunks > blocks:
        rule = f"there are only {blocks} parts: layers, embedding and head"
        add("pipeline", layout.pipeline * layout.chunks, rule, "Choose fewer stages.")
    if layout.sharding == "full" and layout.pipeline > 1:
        rule = "weights that are gathered for every micro-batch cannot be combined with stages"
        add("sharding", "full", rule, "Choose sharding=optimizer, or one stage.")
    if not _heads_divide(job.shape, layout.tensor):
        add("tensor", layout.tensor, "heads do not divide by it", "Choose a divisor of the heads.")
    return found


def _heads_divide(shape: ModelShape, ranks: int) -> bool:
    for mixer in set(shape.attention):
        if isinstance(mixer, AttentionShape):
            few = mixer.num_kv_heads
            if mixer.num_heads % ranks or (few % ranks and ranks % few):
                return False
        elif isinstance(mixer, LatentAttentionShape):
            if mixer.num_heads % ranks:
                return False
        elif ranks > 1:
            return False
    return True


def divisors(number: int, most: int | None = None) -> list[int]:
    """Returns the divisors in order, up to ``most``."""
    limit = number if most is None else min(most, number)
    return [value for value in range(1, limit + 1) if number % value == 0]


def enumerate_layouts(
    job: Job,
    cluster: Cluster,
    recompute: Sequence[Recompute] = RECOMPUTE,
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    base: Layout | None = None,
) -> Iterator[Layout]:
    """Yields every layout that the job can have, whatever its memory.

    Tensor parallelism is a power of two up to 16 inside a domain; only sequences of 16384 tokens and more are
    cut; stages take 1, 2, 4 or 8 turns. Data-parallel ranks share at least the optimizer's states.

    Args:
        job: The job.
        cluster: The cluster.
        recompute: Kinds of recomputation to try.
        micro_batches: Sizes of micro-batches to try.
        base: Layout that gives ``overlap`` and ``graphed``.
    """
    base, gpus, domain = base or Layout(), cluster.gpus, cluster.gpu.domain
    experts = [ffn.num_experts for ffn in job.shape.moe]
    spreads = divisors(min(experts)) if experts else [1]
    contexts = [1, 2, 4, 8, 16] if job.seq_len >= LONG else [1]
    cuts = product(
        [tensor for tensor in (1, 2, 4, 8, 16) if tensor <= domain],
        contexts,
        divisors(gpus, len(job.shape.layers)),
    )
    for tensor, context, pipeline in cuts:
        if tensor * context > domain or gpus % (tensor * context * pipeline):
            continue
        turns = (1, 2, 4, 8) if pipeline > 1 else (1,)
        for chunks, expert, micro_batch in product(turns, spreads, micro_batches):
            one = replace(
                base,
                tensor=tensor,
                context=context,
                pipeline=pipeline,
                chunks=chunks,
                expert=expert,
                micro_batch=micro_batch,
            )
            if not layout_mistakes(one, job, cluster):
                kinds = SHARDING[1:] if pipeline == 1 else SHARDING[1:2]
                for again, sharding in product(recompute, kinds):
                    yield replace(one, recompute=again, sharding=sharding)
