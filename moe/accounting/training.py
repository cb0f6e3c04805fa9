"""FLOPs and bytes of a training step, based on the experts that it really used.

MoE-CAP (arXiv:2412.07067) defines its sparsity-aware utilisations for serving alone. The definition for
training is therefore Graft's own:

- FLOPs used: those of `moe.accounting.flops.training_flops_per_token`, with the measured experts per token
  instead of K.
- Bytes: the minimum that every implementation must move. For every micro-batch of every rank, the weights
that
  it touches, once forward and once backward; their gradients, written by a rank's first micro-batch and read
  and written by each later one; and in the update, gradients read, weights and optimizer state read and
  written. Activations, casts, recomputation, exchange between ranks, and the gradient of embeddings that are
  only looked up are left out: the share is a lower bound of the real traffic.

Letters: E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.accounting.flops import TRAINING_FORWARDS


@dataclass(frozen=True)
class MoEBlock:
    """Routed experts of one layer, with the properties that determine a step's cost.

    Attributes:
        num_experts: E.
        top_k: K of the router's config.
        matrix: Elements of one expert's matrices: two FLOPs each.
        elements: All elements of one expert.
        trained: Elements with a gradient.
        frozen: Elements of ``matrix`` without one, which need no product for their gradient.
    """

    num_experts: int
    top_k: int
    matrix: int
    elements: int
    trained: int
    frozen: int = 0


@dataclass(frozen=True)
class StepModel:
    """Model as a training step sees it.

    Attributes:
        always: Elements of weights that every micro-batch reads: all but routed experts and embeddings that
            are only looked up.
        always_trained: Elements of ``always`` with a gradient.
        row: Elements that a token looks up.
        moe_blocks: MoE blocks, in the order of the layers.
        update_bytes: Bytes of the update over all ranks, by their shards or replicas. See `update_bytes`.
    """

    always: int
    always_trained: int
    row: int
    moe_blocks: tuple[MoEBlock, ...]
    update_bytes: float


@dataclass(frozen=True)
class StepTouched:
    """Ranks, tokens and experts that the micro-batches of one step touched.

    Attributes:
        ranks: Ranks that computed gradients of their own.
        micro_batches: Micro-batches of all ranks together.
        tokens: Tokens of all ranks together.
        distinct: Distinct experts of a micro-batch, per MoE block; mean over all micro-batches.
        distinct_in_step: The same for all micro-batches of a rank together; mean over the ranks.
        readers: Ranks that read the experts together, per MoE block: an expert is read once for the tokens of
            all of them, and ``distinct`` covers a micro-batch of each at once. Empty if every rank reads the
            experts of its own tokens.
    """

    ranks: int
    micro_batches: int
    tokens: int
    distinct: tuple[float, ...] = ()
    distinct_in_step: tuple[float, ...] = ()
    readers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainingBytes:
    """Minimum bytes that a step must move, over all ranks together.

    Attributes:
        weights: Weights, read forward and backward.
        gradients: Gradients, written and accumulated.
        update: Gradients, weights and optimizer state in the update.
    """

    weights: float
    gradients: float
    update: float

    @property
    def total(self) -> float:
        """Sum of all parts, on which S-MBU of a training step is based."""
        return self.weights + self.gradients + self.update


def used_flops_per_token(
    flops_per_token: float, moe_blocks: Sequence[MoEBlock], experts_per_token: Sequence[float]
) -> float:
    """Computes the FLOPs of a token's forward and backward pass with the used experts, for S-MFU.

    MFU of training counts the configured K experts per token (not all E, as MFU of serving does:
    `moe.accounting.utilisation.Utilisations`). S-MFU counts the slots whose expert computed, as measured:
    dropped slots lower it, a varying K moves it either way. Nothing else differs (convention, attention,
    head, padding), so that both are equal for a fixed K without drops.

    Args:
        flops_per_token: FLOPs with K experts, see `moe.accounting.flops.training_flops_per_token`.
        moe_blocks: MoE blocks of the model, with the same K.
        experts_per_token: Used slots over tokens, per MoE block.

    Raises:
        ValueError: There is not one number per MoE block.
    """
    pairs = zip(moe_blocks, experts_per_token, strict=True)
    more = sum((used - moe.top_k) * (TRAINING_FORWARDS * moe.matrix - moe.frozen) for moe, used in pairs)
    return flops_per_token + 2 * more


def training_step_bytes(
    model: StepModel, touched: StepTouched, weight_size: int, gradient_size: int = 4
) -> TrainingBytes:
    """Computes the bytes of a step as defined in the module.

    Args:
        model: The model.
        touched: Experts and tokens of the step.
        weight_size: Bytes per element of weights that products read.
        gradient_size: Bytes per element of accumulated gradients.

    Raises:
        ValueError: An MoE block has no number of touched experts, or one outside 0 to E.
    """
    counts = (touched.distinct, touched.distinct_in_step)
    wrong = [
        count for count in counts if len(count) != len(model.moe_blocks) or not _fits(count, model.moe_blocks)
    ]
    if wrong:
        limits = tuple(moe.num_experts for moe in model.moe_blocks)
        raise ValueError(f"distinct={wrong[0]} must hold a number from 0 to E for MoE blocks of E={limits}.")
    passes, ranks = touched.micro_batches, touched.ranks
    read = float(passes * model.always)
    moved = float((2 * passes - ranks) * model.always_trained)
    readers = touched.readers or (1,) * len(model.moe_blocks)
    for moe, each, once, together in zip(model.moe_blocks, *counts, readers, strict=True):
        read_experts = passes / together * each
        read += read_experts * moe.elements
        moved += (2 * read_experts - ranks / together * once) * moe.trained
    return TrainingBytes(
        weights=float(weight_size * (2 * read + model.row * touched.tokens)),
        gradients=float(gradient_size * moved),
        update=model.update_bytes,
    )


def update_bytes(weights: int, state: int, gradients: int) -> float:
    """Computes the bytes of an update: gradients read, weights and optimizer state read and written.

    All trained parameters count: an expert without tokens has a gradient of zeros, with which AdamW still
    decays its moments.

    Args:
        weights: Bytes of the trained master weights.
        state: Bytes of the optimizer's state.
        gradients: Bytes of the gradients.
    """
    return float(2 * weights + 2 * state + gradients)


def _fits(count: Sequence[float], moe_blocks: Sequence[MoEBlock]) -> bool:
    return all(0 <= used <= moe.num_experts for used, moe in zip(count, moe_blocks, strict=True))
