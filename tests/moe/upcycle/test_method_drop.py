"""Drop-Upcycling: which neurons change, out of which distribution, and what the released code does instead.

Letters: D model width, E experts, F width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.experts.weights import ExpertBank, FFNWeights
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.configs.drop_config import DropConfig
from tests.moe.routers.routing_cases import build, make_ffn, make_method, make_router

pytestmark = pytest.mark.usefixtures("one_thread")


def _matrices(bank: ExpertBank, F: int) -> dict[str, Tensor]:
    """Neurons first: ``[E, F, D]`` of each matrix."""
    return {
        "gate": bank.w_up_EUD[:, :F],
        "up": bank.w_up_EUD[:, F:],
        "down": bank.w_down_EDF.transpose(1, 2),
    }


def _dense(ffn: FFNWeights) -> dict[str, Tensor]:
    assert ffn.gate_FD is not None
    return {"gate": ffn.gate_FD, "up": ffn.up_FD, "down": ffn.down_DF.t()}


def _changed(config: DropConfig, ffn: FFNWeights) -> dict[str, Tensor]:
    """``[E, F]`` whether a neuron has changed, for each matrix."""
    made, dense = _matrices(build(config, ffn).bank, ffn.width), _dense(ffn)
    return {name: (made[name] != dense[name]).any(-1) for name in made}


@pytest.mark.parametrize(
    # int(ratio * 10) neurons: 0.29 * 10 = 2.9 and is rounded down.
    ("ratio", "count"),
    [(0.5, 5), (0.29, 2), (1.0, 10), (0.0, 0)],
)
@pytest.mark.parametrize("change", ["redraw", "noise"])
def test_an_expert_changes_at_the_same_neurons_in_all_matrices(ratio: float, count: int, change: str) -> None:
    ffn = make_ffn()
    changed = _changed(DropConfig(num_experts=4, ratio=ratio, change=change), ffn)  # type: ignore[arg-type]
    for of_matrix in changed.values():
        assert of_matrix.sum(-1).tolist() == [count] * 4
        assert torch.equal(of_matrix, changed["gate"])
    if 0 < count < 10:
        assert len({tuple(row) for row in changed["gate"].tolist()}) > 1, "experts change alike"


def test_what_is_drawn_has_the_moments_of_the_dense_matrix() -> None:
    ffn = make_ffn(D=16, F=512)
    assert ffn.gate_FD is not None
    ffn.gate_FD.mul_(10).add_(3)
    config = DropConfig(num_experts=4)
    made, changed = _matrices(build(config, ffn).bank, 512), _changed(config, ffn)
    for name, dense in _dense(ffn).items():
        drawn = made[name][changed[name]]
        assert drawn.numel() == 4 * 256 * 16
        # 16384 draws: standard errors of 0.8% of a deviation for the mean and 0.6% for the deviation.
        assert float(drawn.mean()) == pytest.approx(float(dense.mean()), abs=0.04 * float(dense.std())), name
        assert float(drawn.std()) == pytest.approx(float(dense.std()), rel=0.03), name


def test_noise_is_absolute() -> None:
    ffn = make_ffn(D=16, F=512)
    config = DropConfig(num_experts=4, change="noise", noise_std=0.02)
    made, changed = _matrices(build(config, ffn).bank, 512), _changed(config, ffn)
    for name, dense in _dense(ffn).items():
        noise = (made[name] - dense)[changed[name]]
        assert float(noise.std()) == pytest.approx(0.02, rel=0.03), name


def test_the_released_code_leaves_an_eighth_of_the_neurons_whole() -> None:
    # Each matrix keeps half, by itself: (1 - r)^3 = 1/8 at r = 1/2. The paper's form keeps half.
    F = 2048
    ffn = make_ffn(D=4, F=F)
    made, dense = _matrices(build(DropConfig(num_experts=2, independent=True), ffn).bank, F), _dense(ffn)
    for e in range(2):
        kept = []
        for name in dense:
            place = {tuple(row): i for i, row in enumerate(dense[name].tolist())}
            found = [place.get(tuple(row)) for row in made[name][e].tolist()]
            assert sum(where is not None for where in found) == F // 2, name
            kept.append(found)
        whole = [
            gate for gate, up, down in zip(*kept, strict=True) if gate is not None and gate == up == down
        ]
        # 2048 neurons at 1/8: a deviation of sqrt(2048 * 7/64) = 15.
        assert abs(len(whole) - F // 8) < 75
        assert whole != sorted(whole), "the released code permutes the neurons"


def test_the_released_code_takes_the_moments_of_what_it_replaces() -> None:
    # One weight of a million among 2000 of deviation 1/2: the deviation of a slice that holds it is 30000, of
    # one that does not 1/2.
    ffn = make_ffn(D=1, F=2000, gated=False)
    ffn.up_FD[0] = 1e6
    large = {}
    for independent in (True, False):
        up_EF = build(DropConfig(num_experts=8, independent=independent), ffn).bank.w_up_EUD[:, :, 0].abs()
        large[independent] = [int((up_F > 100).sum()) for up_F in up_EF]
    assert all(count == 1 or count > 900 for count in large[True]) and 1 in large[True]
    assert all(count > 900 for count in large[False])


def test_biases_of_neurons_that_are_drawn_become_zero() -> None:
    ffn = make_ffn(biased=True)
    config = DropConfig(num_experts=2)
    bank, changed = build(config, ffn).bank, _changed(config, ffn)
    assert bank.b_up_EU is not None and ffn.b_gate_F is not None and ffn.b_up_F is not None
    for name, dense, made in (
        ("gate", ffn.b_gate_F, bank.b_up_EU[:, :10]),
        ("up", ffn.b_up_F, bank.b_up_EU[:, 10:]),
    ):
        assert torch.equal(made, torch.where(changed[name], 0.0, dense))


def test_a_share_that_is_no_neuron_is_refused() -> None:
    method = make_method(DropConfig(ratio=0.05))
    (found,) = method.check(TopKConfig(), ffn_shape(make_ffn()))
    assert (found.path, found.value) == ("upcycle.ratio", 0.05)
    assert found.rule == "of 10 neurons that is not one"
    assert method.check(TopKConfig(), None) == []


def test_it_is_exact_only_where_nothing_changes() -> None:
    router = make_router(TopKConfig())
    assert not make_method(DropConfig(ratio=1e-6)).is_exact(router)
    assert make_method(DropConfig(ratio=0.0)).is_exact(router)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 1.5}, "ratio=1.5: it is a share of the neurons. Set it from 0 to 1"),
        ({"ratio": -0.1}, "ratio=-0.1: it is a share"),
        ({"noise_std": 0.0}, "noise_std=0.0: there would be no noise. Set it above 0"),
    ],
)
def test_refused_configs(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropConfig(**given)  # type: ignore[arg-type]
