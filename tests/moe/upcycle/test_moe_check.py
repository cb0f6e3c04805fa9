"""The step-0 gate: figures worked by hand, and who is named when it closes."""

from __future__ import annotations

import math

import pytest
import torch

from moe.errors import ExactnessError
from moe.upcycle.equivalence import (
    MAX_KL,
    TOLERANCES,
    LayerDrift,
    LogitDrift,
    agree,
    layer_drift,
    logit_drift,
    require_exact,
)

GOOD = LogitDrift(max_diff=0.0, max_logit=10.0, kl=0.0, argmax_agreement=1.0)


def _drift(layer: int, max_relative: float) -> LayerDrift:
    return LayerDrift(layer, max_relative, 1.0, 1.0, max_relative)


def test_layer_drift_worked_by_hand() -> None:
    # dense (3, 4), moe (3, 0): difference (0, -4). Norms 5, 3, 4; product 9.
    drift = layer_drift(7, torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    assert drift.layer == 7
    assert drift.relative_error == pytest.approx(4 / 5)
    assert drift.cosine == pytest.approx(9 / (5 * 3))
    assert drift.gain == pytest.approx(3 / 5)
    assert drift.max_relative == pytest.approx(4 / 4)


def test_equal_layers_do_not_drift() -> None:
    x = torch.randn(3, 4)
    drift = layer_drift(0, x, x.clone())
    assert (drift.relative_error, drift.max_relative) == (0.0, 0.0)
    assert drift.cosine == pytest.approx(1) and drift.gain == pytest.approx(1)


def test_logit_drift_worked_by_hand() -> None:
    # Token 0: p = [3/4, 1/4], q = [1/4, 3/4]: KL = 3/4 ln 3 - 1/4 ln 3 = ln(3) / 2; the choice differs.
    # Token 1: the same distribution, shifted by 1: KL 0, and the largest difference would be 1.
    ln3 = math.log(3)
    drift = logit_drift(torch.tensor([[ln3, 0.0], [2.0, -4.0]]), torch.tensor([[0.0, ln3], [3.0, -3.0]]))
    assert drift.kl == pytest.approx(ln3 / 2 / 2, rel=1e-5)
    assert drift.argmax_agreement == 0.5
    assert drift.max_diff == pytest.approx(ln3)
    assert drift.max_logit == 4.0 and drift.relative == pytest.approx(ln3 / 4)


def test_fp64_logits_are_compared_in_fp64() -> None:
    # Half a rounding step of fp32 above 1: rounded to fp32 first, 1e-12 would become 1.2e-7 or nothing.
    dense = torch.tensor([[1 + 2**-24, 0.0]], dtype=torch.float64)
    drift = logit_drift(dense, dense + torch.tensor([[1e-12, 0.0]], dtype=torch.float64))
    assert drift.max_diff == pytest.approx(1e-12, rel=1e-3)
    assert drift.relative <= TOLERANCES[torch.float64]


def test_what_agrees_passes() -> None:
    for dtype, tolerance in TOLERANCES.items():
        require_exact("copy", GOOD, [_drift(0, tolerance)], dtype)
    require_exact("copy", GOOD, [], torch.float32)


def test_layers_are_named_the_worst_first() -> None:
    layers = [_drift(0, 0.0), _drift(3, 0.01), _drift(5, 0.5), _drift(8, float("nan")), _drift(9, 1e-5)]
    with pytest.raises(ExactnessError) as caught:
        require_exact("copy", GOOD, layers, torch.float32)
    text = str(caught.value)
    assert "upcycling by 'copy' claims to keep the function and does not" in text
    assert "Differing: layer 8 (by nan), layer 5 (by 5.00e-01), layer 3 (by 1.00e-02)." in text
    assert "at most 1.0e-04 is allowed for torch.float32" in text
    assert "layer 0" not in text and "layer 9" not in text


def test_only_the_eight_worst_are_named() -> None:
    layers = [_drift(i, 0.1 * (i + 1)) for i in range(12)]
    with pytest.raises(ExactnessError) as caught:
        require_exact("copy", GOOD, layers, torch.float32)
    assert [i for i in range(12) if f"layer {i} " in str(caught.value)] == [4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("difference", [0.5, float("nan"), float("inf")])
def test_logits_that_differ_under_layers_that_agree(difference: float) -> None:
    logits = LogitDrift(max_diff=difference, max_logit=10.0, kl=0.1, argmax_agreement=0.9)
    with pytest.raises(ExactnessError, match="Each single layer agrees; the model changed elsewhere"):
        require_exact("copy", logits, [_drift(0, 0.0)], torch.bfloat16)


def test_nan_in_an_output_closes_the_gate() -> None:
    dense, moe = torch.ones(2, 3), torch.ones(2, 3)
    moe[1, 1] = float("nan")
    with pytest.raises(ExactnessError, match="layer 4"):
        require_exact("copy", logit_drift(dense, moe), [layer_drift(4, dense, moe)], torch.float32)
    with pytest.raises(ExactnessError):
        require_exact("copy", logit_drift(dense, moe), [], torch.float32)


def test_tolerance_is_tighter_the_wider_the_dtype() -> None:
    assert TOLERANCES[torch.float64] < TOLERANCES[torch.float32] < TOLERANCES[torch.float16]
    assert TOLERANCES[torch.float16] < TOLERANCES[torch.bfloat16] < 0.1


def test_zero_outputs_do_not_divide_by_zero() -> None:
    zero = torch.zeros(2, 3)
    assert layer_drift(0, zero, zero).max_relative == 0.0
    assert logit_drift(zero, zero).relative == 0.0


def test_in_16_bits_a_token_may_go_elsewhere_and_the_whole_may_not_move() -> None:
    # One of 4000 tokens differs by a tenth: the largest difference is large, the mean divergence is not.
    dense = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    one_token = dense.clone()
    one_token[7, 3] += 0.1 * float(dense.abs().max())
    drift = logit_drift(dense, one_token)
    assert drift.relative > TOLERANCES[torch.bfloat16]
    assert agree(drift, torch.bfloat16)
    assert not agree(drift, torch.float32)
    # Every token is a little off: the largest difference is small, and it is another model.
    everywhere = dense * 1.08
    drift = logit_drift(dense, everywhere)
    assert drift.kl > MAX_KL
    assert not agree(drift, torch.bfloat16)
