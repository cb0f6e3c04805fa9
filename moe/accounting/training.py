"""What a training step computes and moves, from the experts that it really used.

MoE-CAP (arXiv:2412.07067) defines its sparsity-aware shares for serving alone and leaves training for later.
What is here is therefore Graft's own definition:

- FLOPs used: those of `moe.accounting.flops.training_flops_per_token`, with the experts a token that were
  measured in the place of K.
- Bytes: what every implementation must move at least. Of every micro-batch of every rank, the weights that it
  touches, once forward and once backward; their gradients, written by a rank's first micro-batch and read and
  written by each that follows; and in the update, gradients read, weights and optimizer state read and
  written. Activations, casts, recomputation, exchange between ranks, and the gradient of embeddings that are
  only looked up are left out: the share is a lower bound of the traffic that there was.

Letters: E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.accounting.flops import TRAINING_FORWARDS


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one layer, as far as a step's cost depends on them.

    Attributes:
        num_experts: E.
        top_k: K that the router is set to.
        matrix: Elements of one expert's matrices: two FLOPs each.
        elements: All elements of one expert.
        trained: Of these, those that have a gradient.
        frozen: Of ``matrix``, those that have none, whose gradient is no product.
    """

    num_experts: int
    top_k: int
    matrix: int
    elements: int
    trained: int
    frozen: int = 0


@dataclass(frozen=True)
class StepModel:
    """A model as a training step sees it.

    Attributes:
        always: Elements of weights that every micro-batch reads: all but routed experts and embeddings that
            are only looked up.
        always_trained: Of these, those that have a gradient.
        row: Elements that a token looks up.
        moe_blocks: In the order of the layers.
        update_bytes: Of the update, all ranks together: what their shards or replicas hold. See
            `update_bytes`.
    """

    always: int
    always_trained: int
    row: int
    moe_blocks: tuple[Mixture, ...]
    update_bytes: float


@dataclass(frozen=True)
class StepTouched:
    """What the micro-batches of one step touched.

    Attributes:
        ranks: That computed gradients of their own.
        micro_batches: Of all ranks together.
        tokens: Of all ranks together.
        distinct: Of every mixture, different experts of a micro-batch; mean over all of them.
        distinct_in_step: The same of all micro-batches of a rank together; mean over the ranks.
        readers: Of every mixture, ranks that read its experts together: each is read once for the tokens of
            all of them, and ``distinct`` is of a micro-batch of each at once. Empty where every rank reads
            those of its own tokens.
    """

    ranks: int
    micro_batches: int
    tokens: int
    distinct: tuple[float, ...] = ()
    distinct_in_step: tuple[float, ...] = ()
    readers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that a step must move at least, all ranks together.

    Attributes:
        weights: Read forward and backward.
        gradients: Written and accumulated.
        update: Gradients, weights and optimizer state.
    """

    weights: float
    gradients: float
    update: float

    @property
    def total(self) -> float:
        """All of them: what S-MBU of a training step is of."""
        return self.weights + self.gradients + self.update


def used_flops_per_token(
    flops_per_token: float, moe_blocks: Sequence[Mixture], experts_per_token: Sequence[float]
) -> float:
    """FLOPs of a token's forward and backward pass with the experts that were used: what S-MFU is of.

    MFU of training counts K experts a token, the number that the router is set to (not all E, as MFU of
    serving does: `moe.accounting.utilisation.Utilisations`). S-MFU counts the slots whose expert computed, as
    measured: capacity that drops slots lowers it, a router whose K varies moves it either way. Nothing else
    differs (convention, attention, head, padding), so that with a router that drops nothing and has a fixed
    K both are equal.

    Args:
        flops_per_token: With K of every mixture, see `moe.accounting.flops.training_flops_per_token`.
        moe_blocks: Of the model, with the same K.
        experts_per_token: Of every mixture: slots that were used, over tokens.

    Raises:
        ValueError: There is not one number for every mixture.
    """
    pairs = zip(moe_blocks, experts_per_token, strict=True)
    more = sum((used - moe.top_k) * (TRAINING_FORWARDS * moe.matrix - moe.frozen) for moe, used in pairs)
    return flops_per_token + 2 * more


def training_step_bytes(
    model: StepModel, touched: StepTouched, weight_size: int, gradient_size: int = 4
) -> TrainingBytes:
    """Bytes of a step; see the module for what is counted.

    Args:
        model: The model.
        touched: What the step touched.
        weight_size: Bytes an element of weights as products read them.
        gradient_size: Bytes an element of gradients as they accumulate.

    Raises:
        ValueError: A mixture has no number of touched experts, or one beyond 0 to E.
    """
    counts = (touched.distinct, touched.distinct_in_step)
    wrong = [
        count for count in counts if len(count) != len(model.moe_blocks) or not _fits(count, model.moe_blocks)
    ]
    if wrong:
        limits = tuple(moe.num_experts for moe in model.moe_blocks)
        raise ValueError(f"distinct={wrong[0]} must hold a number from 0 to E for mixtures of E={limits}.")
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
    """Bytes of an update: gradients read, weights and optimizer state read and written.

    All trained parameters are counted: an expert without a token has a gradient of zeros, by which AdamW
    still decays its moments.

    Args:
        weights: Bytes of the master weights that are trained.
        state: Bytes of the optimizer's state.
        gradients: Bytes of the gradients.
    """
    return float(2 * weights + 2 * state + gradients)


def _fits(count: Sequence[float], moe_blocks: Sequence[Mixture]) -> bool:
    return all(0 <= used <= moe.num_experts for used, moe in zip(count, moe_blocks, strict=True))
