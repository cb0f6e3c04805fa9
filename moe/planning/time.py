"""Time of a training step by part. docs/plan.md has the formulas.

Letters: D model width, E experts, K experts a token, P ranks of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from operator import add

from moe.accounting.memory import ElementBytes
from moe.planning.blocks import Block, Blocks
from moe.planning.cluster import bits_of
from moe.planning.layout import Setting
from moe.planning.layout_memory import rank_parameters, rank_tokens, weight_bytes

# Attention's backward computes five products, its forward two.
_ATTENTION_BACKWARD = 2.5
# Weights' gradients are accumulated in fp32: read and written.
_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on a rank of the most expensive stage.

    Attributes:
        products: Matrix products and attention.
        memory: Other traffic between a GPU and its memory.
        launch: Overhead of the host.
        exchange: Rows to experts and back, where not hidden.
        tensor: Communication of tensor and context parallelism, where not hidden.
        pipeline: Activations between stages, where not hidden.
        bubble: Waiting of stages.
        data: Gradients and weights between replicas, where not hidden.
        optimizer: The update.
    """

    products: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    exchange: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*map(add, vars(self).values(), vars(other).values()))

    def times(self, factor: float) -> StepTime:
        """Multiplies all parts by a factor."""
        return StepTime(*(factor * part for part in vars(self).values()))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(vars(self).values()))


def block_time(block: Block, setting: Setting) -> StepTime:
    """Computes the time of one micro-batch's forward and backward through a block, on one rank."""
    layout, job, assumed = setting.layout, setting.job, setting.assumed
    tokens = rank_tokens(layout, job)
    return StepTime(
        products=_products(block, tokens, setting),
        memory=_memory(block, tokens, setting),
        launch=0.0 if layout.graphed or block.experts is None else assumed.launch_s,
        exchange=_exchange(block, tokens, setting),
        tensor=_tensor(block, tokens, setting),
    )


def _products(block: Block, tokens: float, setting: Setting) -> float:
    layout, job, assumed = setting.layout, setting.job, setting.assumed
    gpu, bits = setting.cluster.gpu, bits_of(job.precision)
    share = {16: assumed.products_16, 8: assumed.products_8, 4: assumed.products_4}[bits]
    sustained = float(gpu.power**assumed.power)
    peak = gpu.peak(job.precision) * share * sustained
    passes = 4 if layout.recompute == "full" else 3
    again = block.again if layout.recompute == "selective" else 0
    # a matrix is cut over tensor ranks, each of which sees the tokens of all
    whole = tokens * layout.tensor
    heads = block.logits * block.width
    flops = 2 * tokens * (passes * (block.matrices - heads) + again)
    seconds = flops / peak * (1 + assumed.rows_half / whole)
    # the head is computed in 16 bits and never recomputed
    plain = gpu.bf16 * sustained * assumed.products_16
    seconds += 2 * 3 * tokens * heads / plain * (1 + assumed.rows_half / whole)
    if block.experts is not None:
        rows = tokens * block.top_k * assumed.imbalance
        one = rows * layout.expert / block.experts.num_experts
        seconds += 2 * passes * rows * block.expert_matrices / peak * (1 + assumed.rows_half / one)
    scores = tokens * block.scores * (passes - 2 + _ATTENTION_BACKWARD)
    return seconds + scores / (gpu.bf16 * sustained * assumed.attention)


def _memory(block: Block, tokens: float, setting: Setting) -> float:
    """Computes the time of memory traffic: kept activations, casts of low-bit operands, and weights."""
    layout, job, assumed = setting.layout, setting.job, setting.assumed
    casts = 0.0 if bits_of(job.precision) == 16 else assumed.casts
    row = assumed.traffic * (block.expert_wide + block.expert_narrow) + casts * block.expert_narrow
    crossed = assumed.traffic * (block.wide + block.narrow) + casts * block.narrow
    crossed += block.top_k * assumed.imbalance * row
    if layout.recompute == "full":
        crossed *= 4 / 3
    elif layout.recompute == "selective":
        crossed += 2 * (block.wide_again + block.narrow_again + block.top_k * block.expert_narrow_again)
    dense, routed = rank_parameters(((block, 1),), layout)
    weights = (dense + routed) * (2 * weight_bytes(job.precision) + 2 * _GRADIENT_BYTES)
    logits = block.logits * 3 * assumed.logit_bytes
    return ((2 * crossed + logits) * tokens + weights) / setting.cluster.gpu.memory_bandwidth


@lru_cache(maxsize=4096)
def distinct_groups(experts: int, top_k: int, groups: int) -> float:
    """Returns the expected number of equal groups of experts that hold any of K, under uniform choice."""
    missed = comb(experts - experts // groups, top_k) / comb(experts, top_k)
    return groups * (1 - missed)


def exchange_rows(experts: int, top_k: int, ranks: int, near: int) -> tuple[float, float]:
    """Returns the rows sent per token, one way: between ranks of a domain, and between domains.

    A row goes to each other rank of the domain that holds one of the token's experts, and once to each other
    such domain, which passes it on to the ranks concerned.

    Args:
        experts: E.
        top_k: K.
        ranks: P, the ranks that together hold the experts.
        near: Ranks of the group per domain; a divisor of P.
    """
    domains = ranks // near
    within = distinct_groups(experts, top_k, ranks) * (near - 1) / near
    return within, distinct_groups(experts, top_k, domains) * (domains - 1) / domains


def ranks_nearby(ranks: int, domain: int) -> int:
    """Returns the number of neighbouring ranks of a group that share a domain, equal for all domains."""
    return max(near for near in range(1, min(ranks, domain) + 1) if ranks % near == 0)


def _exchange(block: Block, tokens: float, setting: Setting) -> float:
    layout, assumed, gpu = setting.layout, setting.assumed, setting.cluster.gpu
    if block.experts is None or layout.expert == 1:
        return 0.0
    near = ranks_nearby(layout.expert, gpu.domain)
    within, beyond = exchange_rows(block.experts.num_experts, block.top_k, layout.expert, near)
    # there and back, for activations and gradients, in 16 bits
    passes = 6 if layout.recompute == "full" else 4
    row = 2.0 * block.width * tokens * assumed.imbalance
    seconds = row * (within / gpu.nvlink + beyond / gpu.network) / assumed.links
    hidden = assumed.exchange_hidden if layout.overlap else 0.0
    return passes * seconds * (1 - hidden)


def _tensor(block: Block, tokens: float, setting: Setting) -> float:
    layout, assumed = setting.layout, setting.assumed
    seconds = 0.0
    forward_again = 1 if layout.recompute == "full" else 0
    if layout.tensor > 1 and block.gathers:
        # backward repeats those of forward, and gathers half of them again for the gradients of weights
        count = block.gathers * (2.5 + forward_again)
        moved = 2.0 * block.width * tokens * (layout.tensor - 1)
        seconds += count * moved / setting.cluster.bandwidth(layout.tensor, 1)
    if layout.context > 1 and block.keys:
        keys = 2.0 * block.keys * tokens * (layout.context - 1)
        band = setting.cluster.bandwidth(layout.context, layout.tensor)
        seconds += (3 + forward_again) * keys / band
    return seconds * assumed.exposed / assumed.links


def stage_time(blocks: Blocks, times: Mapping[int, StepTime]) -> StepTime:
    """Returns the time of one micro-batch through these blocks, from the times by ``id`` of a block."""
    return sum((times[id(block)].times(count) for block, count in blocks), StepTime())


def step_time(
    stages: Sequence[Blocks], times: Mapping[int, StepTime], setting: Setting, sizes: ElementBytes
) -> StepTime:
    """Computes the time of a whole step.

    Args:
        stages: The blocks of each stage.
        times: Result of `block_time` by ``id`` of a block.
        setting: Layout, job, cluster and parameters.
        sizes: Bytes per element of master weights, gradients and optimizer states.
    """
    sums = [stage_time(stage, times) for stage in stages]
    number = max(range(len(sums)), key=lambda index: sums[index].total)
    one, held, layout = sums[number], stages[number], setting.layout
    many = layout.accumulation(setting.job, setting.cluster.gpus)
    once = StepTime(
        pipeline=many * _between_stages(setting.job.shape.hidden_size, setting),
        bubble=(layout.pipeline - 1) / layout.chunks * one.total,
        data=_data(held, many, one.total, setting, sizes),
        optimizer=_update(held, setting, sizes),
    )
    return one.times(many) + once


def _between_stages(width: int, setting: Setting) -> float:
    """Computes the time of sending activations there and gradients back, at every turn."""
    layout, assumed = setting.layout, setting.assumed
    if layout.pipeline == 1:
        return 0.0
    gpu, inner = setting.cluster.gpu, setting.cluster.gpus // layout.pipeline
    band = gpu.nvlink if inner * layout.pipeline <= gpu.domain else gpu.network
    moved = 2 * 2.0 * width * rank_tokens(layout, setting.job) * layout.chunks
    return moved / band * assumed.exposed / assumed.links


def _data(blocks: Blocks, many: int, micro_batch: float, setting: Setting, sizes: ElementBytes) -> float:
    layout, cluster, assumed = setting.layout, setting.cluster, setting.assumed
    dense, routed = rank_parameters(blocks, layout)
    seconds = 0.0
    for held, ranks, stride in (
        (dense, layout.replicas(cluster.gpus), layout.tensor),
        (routed, layout.expert_replicas(cluster.gpus), layout.expert),
    ):
        if ranks == 1 or not held:
            continue
        cut = held * (ranks - 1) / ranks / (cluster.bandwidth(ranks, stride) * assumed.links)
        if layout.sharding == "full":
            # gathered for forward and for backward; gradients are scattered at once
            seconds += many * cut * (2 * weight_bytes(setting.job.precision) + sizes.gradients)
        elif layout.sharding == "optimizer":
            seconds += cut * (weight_bytes(setting.job.precision) + sizes.gradients)
        else:
            seconds += 2 * cut * sizes.gradients
    beside = many if layout.sharding == "full" else 1
    return max(0.0, seconds - assumed.reduce_hidden * beside * micro_batch)


def _update(blocks: Blocks, setting: Setting, sizes: ElementBytes) -> float:
    """Computes the time to read gradients, read and write master weights and states, and write weights."""
    layout, gpus = setting.layout, setting.cluster.gpus
    dense, routed = rank_parameters(blocks, layout)
    if layout.sharding != "none":
        dense, routed = dense / layout.replicas(gpus), routed / layout.expert_replicas(gpus)
    moved = sizes.gradients + 2 * (sizes.weights + sizes.optimizer) + weight_bytes(setting.job.precision)
    return (dense + routed) * moved / setting.cluster.gpu.memory_bandwidth
