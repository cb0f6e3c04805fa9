"""How far each method is from the dense network before training: who is nearer than whom.

On one random layer and input of unit variance, so that the order is held and no figure.

Letters: T tokens, D model width, E experts, F width.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.routers.configs import RouterConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from moe.upcycle.configs.partition_config import PartitionConfig
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from moe.upcycle.configs.shuffle_slice_config import ShuffleSliceConfig
from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from moe.upcycle.equivalence import LayerDrift, layer_drift
from recipes.models.hf.ffn_blocks import dense_ffn
from tests.moe.routers.routing_cases import make_layer

pytestmark = pytest.mark.usefixtures("one_thread")

_RENORMALISED, _SHARES = TopKConfig(), TopKConfig(renormalise=False)


@cache
def _layer() -> tuple[FFNWeights, Tensor]:
    """A network with columns of different weight, as trained ones have, and its input."""
    g = torch.Generator().manual_seed(0)
    D, F = 64, 256
    tails_F = torch.randn(F, generator=g, dtype=torch.float64).exp()
    ffn = FFNWeights(
        gate_FD=torch.randn(F, D, generator=g, dtype=torch.float64) / D**0.5,
        up_FD=torch.randn(F, D, generator=g, dtype=torch.float64) / D**0.5,
        down_DF=torch.randn(D, F, generator=g, dtype=torch.float64) / F**0.5 * tails_F,
        activation="silu",
    )
    return ffn, torch.randn(256, D, generator=g, dtype=torch.float64)


def _drift(config: UpcycleConfig, router: RouterConfig = _RENORMALISED) -> LayerDrift:
    ffn, x_TD = _layer()
    layer = make_layer(router, config, ffn).eval()
    rows_ED = layer.router.rows_ED()
    assert rows_ED is not None
    with torch.no_grad():
        rows_ED.div_(30)  # as a run draws them, with a deviation of 0.02
        return layer_drift(0, dense_ffn(x_TD, ffn), layer(x_TD))


def _error(config: UpcycleConfig, router: RouterConfig = _RENORMALISED) -> float:
    return _drift(config, router).relative_error


def test_what_is_exact() -> None:
    groups = VirtualGroupConfig(num_experts=64, granularity=8)
    for config, router in (
        (CopyConfig(), _RENORMALISED),
        (CopyConfig(permute=True), TopKConfig(score="sigmoid")),
        (groups, TopKConfig(top_k=8)),
        (groups, TopKConfig(top_k=16)),
        (SharedDenseConfig(), _SHARES),
    ):
        assert _error(config, router) < 1e-12, (config, router)


def test_copies_lose_what_their_weights_do_not_sum_to() -> None:
    plain = _drift(CopyConfig(), _SHARES)
    factor = _drift(VirtualGroupConfig(granularity=1), _SHARES)
    roots = _drift(VirtualGroupConfig(granularity=1, scale="cube_root"), _SHARES)
    # The same direction, and less of it; a factor of E / K overshoots, as the best two of eight weigh more
    # than two eighths; a root on each matrix turns the output as well.
    assert plain.gain < 1 < factor.gain
    assert plain.cosine > 0.9 and factor.cosine > roots.cosine
    assert factor.relative_error < roots.relative_error


def test_the_factor_is_exact_on_down_alone() -> None:
    groups = VirtualGroupConfig(num_experts=64, granularity=8, scale="cube_root")
    roots = _error(groups, TopKConfig(top_k=8))
    assert 0.05 < roots < _error(groups, TopKConfig(top_k=8, renormalise=False))


def test_a_larger_share_that_is_drawn_is_further_away() -> None:
    errors = [_error(DropConfig(ratio=ratio)) for ratio in (0.1, 0.25, 0.5, 1.0)]
    assert errors == sorted(errors) and errors[0] > 0.1 and errors[-1] > 1


def test_one_set_of_neurons_is_nearer_than_one_for_each_matrix() -> None:
    shared, independent = _drift(DropConfig()), _drift(DropConfig(independent=True))
    assert shared.relative_error < independent.relative_error
    assert shared.cosine > 0.4 > independent.cosine


def test_noise_is_nearer_than_redrawing() -> None:
    assert _error(DropConfig(change="noise")) < _error(DropConfig(ratio=0.1))


def test_print_the_drifts() -> None:
    rows: list[tuple[str, UpcycleConfig, RouterConfig]] = [
        ("copy", CopyConfig(), _RENORMALISED),
        ("copy, weights not renormalised", CopyConfig(), _SHARES),
        ("virtual_group granularity=1, not renormalised", VirtualGroupConfig(granularity=1), _SHARES),
        ("virtual_group granularity=2", VirtualGroupConfig(), _RENORMALISED),
        ("virtual_group scale=cube_root", VirtualGroupConfig(scale="cube_root"), _RENORMALISED),
        ("virtual_group scale=none", VirtualGroupConfig(scale="none"), _RENORMALISED),
        ("shared_dense", SharedDenseConfig(), _RENORMALISED),
        ("drop ratio=0.1", DropConfig(ratio=0.1), _RENORMALISED),
        ("drop ratio=0.25", DropConfig(ratio=0.25), _RENORMALISED),
        ("drop ratio=0.5", DropConfig(), _RENORMALISED),
        ("drop ratio=0.5 independent", DropConfig(independent=True), _RENORMALISED),
        ("drop ratio=0.5 change=noise", DropConfig(change="noise"), _RENORMALISED),
        ("shuffle_slice", ShuffleSliceConfig(), _RENORMALISED),
        ("partition", PartitionConfig(), _RENORMALISED),
    ]
    lines = ["| upcycle= | relative error | cosine | gain |", "|---|---|---|---|"]
    for name, config, router in rows:
        drift = _drift(config, router)
        lines.append(f"| {name} | {drift.relative_error:.2f} | {drift.cosine:.2f} | {drift.gain:.2f} |")
    print("\n".join(["", *lines]))


def test_divisions_are_far_away_whatever_their_factor() -> None:
    # Two random eighths of the neurons say little of the sum over all.
    for factor in (1.0, 2.0, None):
        drift = _drift(PartitionConfig(scale_factor=factor))
        assert drift.relative_error > 0.8 and drift.cosine < 0.7
    assert _error(ShuffleSliceConfig()) > 0.7
