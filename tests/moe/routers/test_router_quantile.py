"""Quantile balancing: thresholds worked by hand, and the table of the reference on the logits it was made on.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.routers.configs.quantile_config import QuantileConfig
from moe.routers.quantile import QuantileRouter
from moe.routing.quantiles import quantile_biases, quantile_thresholds, top_thresholds
from tests.moe.routers.routing_cases import make_context

T, E, K = 4096, 16, 2


def synthetic_logits() -> tuple[Tensor, Tensor]:
    """The reference's logits, N(0, 1) + expert offset 1.5 N(0, 1), and a fresh batch of the same offsets."""
    draw = np.random.default_rng(0).standard_normal
    offsets_E = 1.5 * draw(E)
    return torch.tensor(draw((T, E)) + offsets_E), torch.tensor(draw((T, E)) + offsets_E)


def figures(chosen_TE: Tensor) -> dict[str, float]:
    """Mean, deviation and maximum of experts a token, tokens without any, CV and MaxVio of the load."""
    used_T, load_E = chosen_TE.sum(1).double(), chosen_TE.sum(0).double()
    return {
        "mean": float(used_T.mean()),
        "deviation": float(used_T.std()),
        "most": float(used_T.max()),
        "none": float((used_T == 0).double().mean()),
        "cv": float(load_E.std(correction=0) / load_E.mean()),
        "maxvio": float(load_E.max() / load_E.mean() - 1),
    }


def top(scores_TE: Tensor) -> Tensor:
    """The K best of each row, as a mask."""
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(K).indices, True)


def test_these_are_the_logits_of_the_notes() -> None:
    found = figures(top(synthetic_logits()[0]))
    assert (round(found["cv"], 3), round(found["maxvio"], 2)) == (1.568, 4.71)


# As the reference has them. Where a quantile lies between two values it does not say, and it decides single
# tokens of 512 an expert: ours are .230/.083/.013/.004 and .574/.129/.012/.002.
@pytest.mark.parametrize(
    ("iterations", "cv", "maxvio"),
    [(1, 0.218, 0.508), (2, 0.073, 0.096), (5, 0.011, 0.010), (20, 0.001, 0.002)],
)
def test_iterations_even_out_counts(iterations: int, cv: float, maxvio: float) -> None:
    logits_TE, _ = synthetic_logits()
    bias_E = quantile_biases(logits_TE, K, iterations, torch.zeros(E))
    found = figures(top(logits_TE - bias_E))
    assert found["cv"] == pytest.approx(cv, abs=0.015)
    assert found["maxvio"] == pytest.approx(maxvio, abs=0.07)
    assert bias_E.mean().item() == pytest.approx(0, abs=1e-12)


def test_biases_hold_on_a_fresh_batch() -> None:
    logits_TE, fresh_TE = synthetic_logits()
    found = figures(top(fresh_TE - quantile_biases(logits_TE, K, 20, torch.zeros(E))))
    # Notes: .039 and .080
    assert found["cv"] == pytest.approx(0.039, abs=0.002) and found["maxvio"] == pytest.approx(
        0.080, abs=0.004
    )


def test_dynamic_rule_on_the_same_and_on_a_fresh_batch() -> None:
    logits_TE, fresh_TE = synthetic_logits()
    threshold_E = quantile_thresholds(logits_TE, K)
    same, fresh = figures(logits_TE > threshold_E), figures(fresh_TE > threshold_E)
    # Notes, in full: 2.00 (1.31, 8), 12.1 %, 0 and 0; then 2.00, 12.0 %, .049 and .091
    assert {name: round(value, 3) for name, value in same.items()} == {
        "mean": 2.0,
        "deviation": 1.311,
        "most": 8.0,
        "none": 0.121,
        "cv": 0.0,
        "maxvio": 0.0,
    }
    assert [round(fresh[name], 3) for name in ("mean", "none", "cv", "maxvio")] == [2.0, 0.121, 0.049, 0.092]


def test_thresholds_worked_by_hand() -> None:
    scores = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    # K = 1 of E = 2: two of four exceed it, so that it is halfway between the second and the third largest.
    assert quantile_thresholds(scores, 1).tolist() == [2.5, 25.0]
    # All four: 1 below the smallest.
    assert quantile_thresholds(scores, 2).tolist() == [0.0, 9.0]
    # Real are 1, 2, 4: 1.5 rounds up to 2; halfway between 2 and 1.
    mask_T = torch.tensor([True, True, False, True])
    assert quantile_thresholds(scores, 1, mask_T).tolist() == [1.5, 15.0]
    # One real token of two: it is the only one that can exceed.
    assert top_thresholds(scores[:1], torch.tensor(0), 0).tolist() == [0.0, 9.0]


def test_an_iteration_worked_by_hand() -> None:
    scores = torch.tensor([[4.0, 0.0], [3.0, 2.0]])
    # K = 1: alpha is the second largest of each row, [0, 2]; s - alpha = [[4, 0], [1, 0]]; one of two is to
    # exceed: beta = [2.5, 0], less their mean [1.25, -1.25]; s - beta = [[2.75, 1.25], [1.75, 3.25]].
    bias_E = quantile_biases(scores, 1, 1, torch.zeros(2))
    assert bias_E.tolist() == [1.25, -1.25]
    assert (scores - bias_E).argmax(1).tolist() == [0, 1]


def _router(**fields: Any) -> QuantileRouter:
    router = QuantileRouter(QuantileConfig(**fields), 2, 2)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(2))
    return router


def test_the_next_step_uses_the_thresholds_of_this_one() -> None:
    x_TD = torch.tensor([[4.0, 0.0], [3.0, 2.0]])
    router = _router(top_k=1, renormalise=False, iterations=1, decay=0.5)
    assert router(x_TD, make_context()).expert_ids_TK.tolist() == [[0], [0]]
    router.after_optimizer_step(make_context(step=1))
    assert router.threshold.value_N.tolist() == [1.25, -1.25] and router.threshold.steps == 1
    # The weight is the probability without the threshold: softmax(3, 2) of expert 1.
    routing = router.eval()(x_TD, make_context())
    assert routing.expert_ids_TK.tolist() == [[0], [1]]
    assert routing.weights_TK[1].item() == pytest.approx(1 / (1 + torch.tensor(1.0).exp().item()))
    # s - beta = [[2.75, 1.25], [1.75, 3.25]], alpha = [1.25, 1.75], s - alpha = [[2.75, -1.25], [1.25, .25]]:
    # beta = [2, -.5], less their mean 0.75 [1.25, -1.25]: balanced, the threshold stays.
    router.train()(x_TD, make_context(step=1))
    router.after_optimizer_step(make_context(step=2))
    assert router.threshold.value_N.tolist() == [1.25, -1.25] and router.threshold.steps == 2


def test_what_the_sources_keep_of_old_thresholds() -> None:
    """Megatron's fixed thresholds are those of the last step alone, Su's dynamic ones keep nine tenths."""
    assert QuantileConfig().share_kept == 0 and QuantileConfig(mode="dynamic").share_kept == 0.9
    assert QuantileConfig(decay=0.5).share_kept == QuantileConfig(mode="dynamic", decay=0.5).share_kept == 0.5
    router = _router(top_k=1, renormalise=False, iterations=1)
    for step, x_TD in enumerate(([[4.0, 0.0], [3.0, 2.0]], [[0.0, 4.0], [2.0, 3.0]])):
        router(torch.tensor(x_TD), make_context(step=step))
        router.after_optimizer_step(make_context(step=step + 1))
        if step == 0:
            assert router.threshold.value_N.tolist() == [1.25, -1.25]
    # s - beta = [[-1.25, 5.25], [.75, 4.25]], alpha = [-1.25, .75], s - alpha = [[1.25, 5.25], [1.25, 2.25]]:
    # column 0 ties at 1.25, column 1 is halfway at 3.75; less their mean 2.5. Of the old nothing is left.
    assert router.threshold.value_N.tolist() == [-1.25, 1.25]


def test_dynamic_thresholds_move_by_their_decay() -> None:
    router = _router(mode="dynamic", top_k=1, renormalise=False, decay=0.75)
    for step, scale in enumerate((1.0, 2.0)):
        # Columns [4, 3, 2, 1] and [1, 2, 3, 4]: two of four exceed 2.5; twice that in the second step.
        column_T = scale * torch.tensor([4.0, 3.0, 2.0, 1.0])
        router(torch.stack([column_T, column_T.flip(0)], 1), make_context(step=step))
        router.after_optimizer_step(make_context(step=step + 1))
    # 0.75 * 2.5 + 0.25 * 5
    assert router.threshold.value_N.tolist() == [3.125, 3.125]


def test_dynamic_guard_and_cap() -> None:
    router = _router(mode="dynamic", top_k=1, renormalise=False, max_experts=1).eval()
    router.threshold.value_N.copy_(torch.tensor([1.0, 0.0]))
    router.threshold.steps.fill_(1)
    # Margins [2, 1]: both exceed, the cap leaves the better. [-1, -.5]: none does, the better is used.
    routing = router(torch.tensor([[3.0, 1.0], [0.0, -0.5]]), make_context())
    assert routing.slot_mask_TK is not None and routing.slot_mask_TK.sum(1).tolist() == [1, 1]
    assert routing.expert_ids_TK[:, 0].tolist() == [0, 1]


def test_thresholds_stay_fp32() -> None:
    router = _router()
    router.threshold.value_N.fill_(1.0009765625)
    assert router.bfloat16().threshold.value_N.tolist() == [1.0009765625] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 1}, "top_k=1: an only weight is always 1, .* Set router.renormalise=false"),
        ({"iterations": 0}, "iterations=0: nothing would balance"),
        ({"decay": 1.0}, "decay=1.0: .* Set it to 0.9"),
        ({"max_experts": 1}, "max_experts=1: tokens use top_k=2 experts in the mean"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantileConfig(**fields)
