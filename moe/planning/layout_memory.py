"""Memory of a rank: weights, gradients, optimizer, activations, buffers. docs/plan.md has the formulas.

Letters: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.accounting.memory import ElementBytes
from moe.planning.assumptions import Assumptions
from moe.planning.blocks import Block, Blocks
from moe.planning.cluster import Precision, bits_of
from moe.planning.layout import Job, Layout


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank.

    Attributes:
        weights: As products read them.
        gradients: Of all weights of the rank.
        optimizer: Master weights and states.
        activations: Of the micro-batches under way.
        buffers: Logits, rows in exchange, gathered layers, and what is reserved.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def weight_bytes(precision: Precision) -> float:
    """Bytes of an element as products read it: 16 bits, or 8 twice, row by row and column by column.

    Four bits are made from sixteen, and both are there.
    """
    return 3.0 if precision == "nvfp4" else 2.0


def operand_bytes(precision: Precision) -> float:
    """Bytes of an element that is kept as operand of a product in backward, without its scale."""
    return bits_of(precision) / 8


def kept_bytes(block: Block, layout: Layout, precision: Precision, imbalance: float = 1.0) -> float:
    """Bytes that a block keeps of one token for backward, on all ranks that share the token.

    Args:
        block: The block.
        layout: Of it what is recomputed.
        precision: Of products.
        imbalance: Rows of the fullest rank over the mean.
    """
    operand = operand_bytes(precision)
    if layout.recompute == "full":
        return 2.0 * block.residual
    again = layout.recompute == "selective"
    wide = block.wide - again * block.wide_again
    narrow = block.narrow - again * block.narrow_again
    row = 2 * block.expert_wide + operand * (block.expert_narrow - again * block.expert_narrow_again)
    return 2 * wide + operand * narrow + block.top_k * imbalance * row


def in_flight(layout: Layout, stage: int, accumulation: int) -> float:
    """Micro-batches whose activations a stage keeps at once, in parts of ``1 / chunks``.

    Stage s of P keeps P - s under one-forward-one-backward; with V turns a stage warms up over
    ``(V - 1) P + 2 (P - s - 1)`` parts and runs one more (D. Narayanan et al., arXiv:2104.04473, section
    2.2). An exchange that is overlapped needs one more.
    """
    stages, turns = layout.pipeline, layout.chunks
    warm = stages - stage - 1
    parts = warm + 1 if turns == 1 else (turns - 1) * stages + 2 * warm + 1
    return min(parts + (layout.overlap and stages > 1), turns * accumulation) / turns


def rank_memory(
    stages: Sequence[Blocks],
    layout: Layout,
    job: Job,
    gpus: int,
    sizes: ElementBytes,
    assumed: Assumptions,
) -> Memory:
    """Of the rank whose stage needs most.

    Args:
        stages: The blocks of each.
        layout: Over ranks.
        job: What is trained.
        gpus: Ranks.
        sizes: Bytes an element of master weights, gradients and optimizer states.
        assumed: Parameters.
    """
    found = [
        _stage_memory(stage, number, layout, job, gpus, sizes, assumed) for number, stage in enumerate(stages)
    ]
    return max(found, key=lambda memory: memory.total)


def rank_parameters(blocks: Blocks, layout: Layout) -> tuple[float, float]:
    """Elements that a rank holds of blocks before replicas cut them: outside routed experts, and theirs."""
    dense = sum(count * block.parameters for block, count in blocks) / layout.tensor
    return dense, sum(count * block.expert_parameters for block, count in blocks) / layout.expert


def _stage_memory(
    blocks: Blocks,
    stage: int,
    layout: Layout,
    job: Job,
    gpus: int,
    sizes: ElementBytes,
    assumed: Assumptions,
) -> Memory:
    dense, routed = rank_parameters(blocks, layout)
    of_dense, of_routed = layout.replicas(gpus), layout.expert_replicas(gpus)
    cut = dense / of_dense + routed / of_routed
    held = cut if layout.sharding == "full" else dense + routed
    states = dense + routed if layout.sharding == "none" else cut
    return Memory(
        held * weight_bytes(job.precision),
        held * sizes.gradients,
        states * (sizes.weights + sizes.optimizer),
        _activations(blocks, stage, layout, job, gpus, assumed),
        _buffers(blocks, layout, job, sizes, assumed) + assumed.reserved,
    )


def rank_tokens(layout: Layout, job: Job) -> float:
    """Tokens of a micro-batch on a rank, after its sequences are cut over tensor and context ranks."""
    return layout.micro_batch * job.seq_len / (layout.tensor * layout.context)


def _activations(
    blocks: Blocks, stage: int, layout: Layout, job: Job, gpus: int, assumed: Assumptions
) -> float:
    tokens = rank_tokens(layout, job)
    kept = sum(count * kept_bytes(block, layout, job.precision, assumed.imbalance) for block, count in blocks)
    many = in_flight(layout, stage, layout.accumulation(job, gpus))
    layers = sum(count for block, count in blocks if block.is_layer) or 1
    stay = 1 - min(layout.offloaded, layers) / layers
    total = tokens * kept * many * stay
    if layout.recompute == "full":
        plain = Layout(tensor=layout.tensor)
        # the block that is being computed once more
        each = (kept_bytes(block, plain, job.precision, assumed.imbalance) for block, _ in blocks)
        total += tokens * max(each)
    return total


def _buffers(blocks: Blocks, layout: Layout, job: Job, sizes: ElementBytes, assumed: Assumptions) -> float:
    tokens = rank_tokens(layout, job)
    logits = max(block.logits for block, _ in blocks) * tokens * assumed.logit_bytes
    # one row for each expert of a token, on its way in and out, of 16 bits
    rows = max(2 * 2 * block.top_k * block.width for block, _ in blocks) * tokens * assumed.imbalance
    gathered = 0.0
    if layout.sharding == "full":
        largest = max(
            block.parameters / layout.tensor + block.expert_parameters / layout.expert for block, _ in blocks
        )
        # the layer that is computed, and the next one
        gathered = 2 * largest * (weight_bytes(job.precision) + sizes.gradients)
    return logits + rows + gathered
