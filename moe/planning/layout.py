"""How a job is laid out over a cluster, and which layouts there are.

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
from moe.planning.cluster import Cluster, Precision

Recompute = Literal["none", "selective", "full"]
Sharding = Literal["none", "optimizer", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
SHARDING: tuple[Sharding, ...] = get_args(Sharding)

# Sequences shorter than this are not cut over ranks.
LONG = 16384


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        shape: Of the model.
        seq_len: Tokens of a sequence.
        global_batch: Sequences of a step.
        precision: Of the products.
    """

    shape: ModelShape
    seq_len: int
    global_batch: int
    precision: Precision = "bf16"


@dataclass(frozen=True)
class Layout:
    """How ranks share the work. Ranks count through ``tensor``, ``context``, data, then ``pipeline``.

    Experts are spread over neighbouring ranks of a pipeline stage, whole (never cut by ``tensor``).

    Attributes:
        tensor: Ranks that cut every matrix but those of routed experts, sequence parallel.
        context: Ranks that cut every sequence.
        pipeline: Stages.
        chunks: Parts of a stage that take turns (interleaved schedule); 1 for none.
        expert: Ranks that hold the experts of a layer between them.
        micro_batch: Sequences.
        recompute: ``selective`` computes norms, activation functions and the up-projections of latent
            attention once more in backward, ``full`` every block.
        sharding: What is cut over data-parallel ranks: nothing, master weights and optimizer states, or
            ``full``: weights and gradients too, gathered layer by layer.
        overlap: The exchange of experts runs beside another micro-batch's products.
        graphed: The whole step is one graph on the device: the host launches nothing in between.
        offloaded: Layers of a rank whose activations wait in the memory of the host.
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
        """Data-parallel replicas."""
        return gpus // (self.tensor * self.context * self.pipeline)

    def replicas(self, gpus: int) -> int:
        """Ranks that hold the same weights outside routed experts."""
        return self.data(gpus) * self.context

    def expert_replicas(self, gpus: int) -> int:
        """Ranks that hold the same experts."""
        return gpus // (self.pipeline * self.expert)

    def accumulation(self, job: Job, gpus: int) -> int:
        """Micro-batches of a replica in a step."""
        return job.global_batch // (self.micro_batch * self.data(gpus))

    @property
    def label(self) -> str:
        """As in tables."""
        parts = [f"EP{self.expert}", f"TP{self.tensor}", f"PP{self.pipeline}"]
        if self.chunks > 1:
            parts.append(f"VP{self.chunks}")
        if self.context > 1:
            parts.append(f"CP{self.context}")
        return " ".join(parts)


def layout_mistakes(layout: Layout, job: Job, cluster: Cluster) -> list[Mistake]:
    """Why the job cannot be laid out so, whatever its memory."""
    found: list[Mistake] = []

    def add(path: str, value: object, rule: str, remedy: str) -> None:
        found.append(Mistake(path, value, rule, remedy))

    gpus, cut = cluster.gpus, layout.tensor * layout.context * layout.pipeline
    if gpus % cut:
        add("layout", layout.label, f"{gpus} GPUs do not divide by TP x CP x PP = {cut}", "Choose divisors.")
        return found
    stage = gpus // layout.pipeline
    if stage % layout.expert:
        rule = f"the {stage} GPUs of a stage do not divide over so many ranks of experts"
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
        add("chunks", layout.chunks, "one stage has no turns to take", "Choose 1.")
    blocks = len(job.shape.layers) + job.shape.next_token_layers + 2
    if layout.pipeline * layout.chunks > blocks:
        rule = f"there are only {blocks} parts: layers, embedding and head"
        add("pipeline", layout.pipeline * layout.chunks, rule, "Choose fewer stages.")
    if layout.sharding == "full" and layout.pipeline > 1:
        rule = "weights that are gathered for every micro-batch do not go with stages"
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
    """In order, at most ``most``."""
    limit = number if most is None else min(most, number)
    return [value for value in range(1, limit + 1) if number % value == 0]


def enumerate_layouts(
    job: Job,
    cluster: Cluster,
    recompute: Sequence[Recompute] = RECOMPUTE,
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    base: Layout | None = None,
) -> Iterator[Layout]:
    """Every layout that the job can have, whatever its memory.

    Tensor parallelism is by powers of two up to 16 inside a domain; sequences are cut only from 16384 tokens
    on; stages take 1, 2, 4 or 8 turns. Data-parallel ranks share the optimizer's states at least.

    Args:
        job: What is trained.
        cluster: Where.
        recompute: What may be recomputed.
        micro_batches: Sequences of a micro-batch.
        base: Of it ``overlap`` and ``graphed``.
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
