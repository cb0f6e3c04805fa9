"""Memory of a rank: weights, gradients, optimizer, activations, buffers. docs/plan.md has the formulas.

Letters: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.accounting.memory import ElementBytes
from moe.planning.blocks import Block, Blocks
from moe.planning.cluster import Precision, bits_of
from moe.planning.layout import Job, Layout, Setting


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank.

    Attributes:
        weights: Weights in the form that products read.
        gradients: Gradients of all weights of the rank.
        optimizer: Master weights and states.
        activations: Activations of the micro-batches in flight.
        buffers: Logits, rows in exchange, gathered layers, and reserved memory.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def weight_bytes(precision: Precision) -> float:
    """Returns the bytes per element that products read: 16 bits, or twice 8 (row-wise and column-wise).

    Four-bit weights are kept next to the 16-bit weights that they are made from.
    """
    return 3.0 if precision == "nvfp4" else 2.0


def operand_bytes(precision: Precision) -> float:
    """Returns the bytes per element kept as an operand of a product in backward, without its scale."""
    return bits_of(precision) / 8


def kept_bytes(block: Block, layout: Layout, precision: Precision, imbalance: float = 1.0) -> float:
    """Returns the bytes per token that a block keeps for backward, over all ranks that share the token.

    Args:
        block: The block.
        layout: Layout that gives the recomputation.
        precision: Precision of products.
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
    """Returns the micro-batches whose activations a stage keeps at once, in units of ``1 / chunks``.

    Stage s of P keeps P - s under one-forward-one-backward; with V turns a stage warms up over ``(V - 1) P +
    2 (P - s - 1)`` parts and runs one more (D. Narayanan et al., arXiv:2104.04473, section 2.2). An
    overlapped exchange needs one more.
    """
    stages, turns = layout.pipeline, layout.chunks
    warm = stages - stage - 1
    parts = warm + 1 if turns == 1 else (turns - 1) * stages + 2 * warm + 1
    return min(parts + (layout.overlap and stages > 1), turns * accumulation) / turns


def rank_memory(stages: Sequence[Blocks], setting: Setting, sizes: ElementBytes) -> Memory:
    """Returns the memory of the rank whose stage needs most.

    Args:
        stages: The blocks of each stage.
        setting: Layout, job, cluster and parameters.
        sizes: Bytes per element of master weights, gradients and optimizer states.
    """
    found = [_stage_memory(stage, number, setting, sizes) for number, stage in enumerate(stages)]
    return max(found, key=lambda memory: memory.total)


def rank_parameters(blocks: Blocks, layout: Layout) -> tuple[float, float]:
    """Returns a rank's elements of blocks before sharding over replicas: non-expert and expert ones."""
    dense = sum(count * block.parameters for block, count in blocks) / layout.tensor
    return dense, sum(count * block.expert_parameters for block, count in blocks) / layout.expert


def _stage_memory(blocks: Blocks, stage: int, setting: Setting, sizes: ElementBytes) -> Memory:
    layout, job, gpus = setting.layout, setting.job, setting.cluster.gpus
    dense, routed = rank_parameters(blocks, layout)
    of_dense, of_routed = layout.replicas(gpus), layout.expert_replicas(gpus)
    cut = dense / of_dense + routed / of_routed
    held = cut if layout.sharding == "full" else dense + routed
    states = dense + routed if layout.sharding == "none" else cut
    return Memory(
        held * weight_bytes(job.precision),
        held * sizes.gradients,
        states * (sizes.weights + sizes.optimizer),
        _activations(blocks, stage, setting),
        _buffers(blocks, setting, sizes) + setting.assumed.reserved,
    )


def rank_tokens(layout: Layout, job: Job) -> float:
    """Returns the tokens of a micro-batch on a rank, with sequences cut over tensor and context ranks."""
    return layout.micro_batch * job.seq_len / (layout.tensor * layout.context)


def _activations(blocks: Blocks, stage: int, setting: Setting) -> float:
    layout, job, assumed = setting.layout, setting.job, setting.assumed
    tokens = rank_tokens(layout, job)
    kept = sum(count * kept_bytes(block, layout, job.precision, assumed.imbalance) for block, count in blocks)
    many = in_flight(layout, stage, layout.accumulation(job, setting.cluster.gpus))
    layers = sum(count for block, count in blocks if block.is_layer) or 1
    stay = 1 - min(layout.offloaded, layers) / layers
    total = tokens * kept * many * stay
    if layout.recompute == "full":
        plain = Layout(tensor=layout.tensor)
        # the block that is being recomputed
        each = (kept_bytes(block, plain, job.precision, assumed.imbalance) for block, _ in blocks)
        total += tokens * max(each)
    return total


def _buffers(blocks: Blocks, setting: Setting, sizes: ElementBytes) -> float:
    layout, job, assumed = setting.layout, setting.job, setting.assumed
    tokens = rank_tokens(layout, job)
    logits = max(block.logits for block, _ in blocks) * tokens * assumed.logit_bytes
    # one 16-bit row per expert of a token, on its way in and out
    rows = max(2 * 2 * block.top_k * block.width for block, _ in blocks) * tokens * assumed.imbalance
    gathered = 0.0
    if layout.sharding == "full":
        largest = max(
            block.parameters / layout.tensor + block.expert_parameters / layout.expert for block, _ in blocks
        )
        # the layer being computed, and the next one
        gathered = 2 * largest * (weight_bytes(job.precision) + sizes.gradients)
    return logits + rows + gathered
