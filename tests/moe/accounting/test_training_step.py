"""What a training step computes and moves, worked by hand."""

from __future__ import annotations

import pytest

from moe.accounting.training import (
    MoEBlock,
    StepModel,
    StepTouched,
    training_step_bytes,
    update_bytes,
    used_flops_per_token,
)
from moe.accounting.utilisation import above_one, share_of_peak

# Two mixtures: of 4 experts of 10 weights and 2 biases, of 8 experts of 20 weights.
FIRST = MoEBlock(num_experts=4, top_k=2, matrix=10, elements=12, trained=12)
SECOND = MoEBlock(num_experts=8, top_k=1, matrix=20, elements=20, trained=20)
MODEL = StepModel(
    always=100,
    always_trained=90,
    row=3,
    moe_blocks=(FIRST, SECOND),
    update_bytes=update_bytes(800, 1600, 800),
)


def test_flops_are_those_of_the_slots_that_were_used() -> None:
    # Forward and backward: three products, two FLOPs a weight.
    assert used_flops_per_token(1000, MODEL.moe_blocks, (2, 1)) == 1000
    # Half a slot of the first mixture was dropped: 6 * 0.5 * 10 less; of the second one more used: 6 * 20.
    assert used_flops_per_token(1000, MODEL.moe_blocks, (1.5, 2)) == 1000 - 30 + 120
    assert used_flops_per_token(1000, (), ()) == 1000
    with pytest.raises(ValueError, match="argument 2 is"):
        used_flops_per_token(1000, MODEL.moe_blocks, (1.5,))


def test_bytes_of_one_micro_batch() -> None:
    found = training_step_bytes(MODEL, StepTouched(1, 1, 7, (3, 5), (3, 5)), weight_size=2)
    # Read: 100 + 3 * 12 + 5 * 20 = 236, forward and backward, and 3 of each of 7 tokens; 2 bytes each.
    assert found.weights == 2 * (2 * 236 + 21)
    # Gradients written once: 90 + 36 + 100, 4 bytes each.
    assert found.gradients == 4 * 226
    # Weights and state read and written, gradients read.
    assert found.update == 2 * 800 + 2 * 1600 + 800
    assert found.total == 986 + 904 + 5600


def test_gradients_that_accumulate_are_read_again() -> None:
    # Two ranks of two micro-batches: each touches 2 and 4 experts, a rank's two together 3 and 6.
    found = training_step_bytes(MODEL, StepTouched(2, 4, 0, (2, 4), (3, 6)), weight_size=4)
    assert found.weights == 4 * 2 * 4 * (100 + 2 * 12 + 4 * 20)
    # Dense: a rank writes, reads, writes: 3 a rank. Experts: 8 touches of the first mixture, 6 of them first.
    dense = 2 * 3 * 90
    first = (8 + (8 - 2 * 3)) * 12
    second = (16 + (16 - 2 * 6)) * 20
    assert found.gradients == 4 * (dense + first + second)


def test_what_is_not_trained_has_no_gradient() -> None:
    frozen = MoEBlock(4, 2, 10, 12, trained=0)
    model = StepModel(100, 0, 0, (frozen,), 0.0)
    assert training_step_bytes(model, StepTouched(1, 3, 5, (4,), (4,)), 2).gradients == 0
    dense = StepModel(100, 100, 0, (), 7.0)
    assert training_step_bytes(dense, StepTouched(1, 1, 5), 4).total == 800 + 400 + 7


@pytest.mark.parametrize(
    ("each", "once"), [((3,), (3,)), ((5, 5), (4, 5)), ((3, 5), (3, 9)), ((3, -1), (3, 0))]
)
def test_numbers_that_cannot_be_are_refused(each: tuple[float, ...], once: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"from 0 to E for MoE blocks of E=\(4, 8\)"):
        training_step_bytes(MODEL, StepTouched(1, 1, 7, each, once), 2)


def test_a_share_of_an_unknown_peak_is_none() -> None:
    assert share_of_peak(100, 2, 10, devices=5) == 1.0
    assert share_of_peak(100, 2, None) is None
    assert above_one("S-MBU", 1.0) is None
    assert "S-MBU is 1.50, above 1: the peak is of another device" in str(above_one("S-MBU", 1.5))
    for wrong in ((-1, 2, 10, 1), (1, 0, 10, 1), (1, 2, 0, 1), (1, 2, 10, 0)):
        with pytest.raises(ValueError, match="An unknown peak is None"):
            share_of_peak(*wrong)
