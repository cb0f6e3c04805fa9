"""The noise of tokens: distribution, independence, and what it does not depend on.

Letters: T tokens, N columns.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe.routing.draws import gumbel_noise, normal_noise, token_positions, uniform_noise
from moe.types import LayerContext
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context

CPU = torch.device("cpu")


def _uniform(T: int = 4096, N: int = 16, seed: int = 1, purpose: str = "test", **fields: object) -> Tensor:
    layer = int(fields.pop("layer_index", 0))  # type: ignore[call-overload]
    return uniform_noise(seed, purpose, T, N, make_context(layer, **fields), CPU)


def test_uniform_noise_is_uniform() -> None:
    noise_TN = _uniform()
    num = noise_TN.numel()
    assert noise_TN.dtype == torch.float32 and noise_TN.min() > 0 and noise_TN.max() < 1
    # Five standard errors: of the mean sqrt(1/12 / num), of 256 counts about sqrt(num / 256).
    assert abs(noise_TN.mean() - 0.5) < 5 * (1 / 12 / num) ** 0.5
    counts = torch.histc(noise_TN, 256, 0, 1)
    chi2 = ((counts - num / 256) ** 2 / (num / 256)).sum()
    # Chi-squared with 255 degrees of freedom: mean 255, standard deviation sqrt(510) = 22.6.
    assert abs(chi2 - 255) < 5 * 22.6


def test_neighbours_are_independent() -> None:
    noise_TN = _uniform() - 0.5
    others = {
        "token": noise_TN.roll(1, 0),
        "column": noise_TN.roll(1, 1),
        "diagonal": noise_TN.roll((1, 1), (0, 1)),
        "step": _uniform(step=1) - 0.5,
        "micro_batch": _uniform(micro_batch=1) - 0.5,
        "layer": _uniform(layer_index=1) - 0.5,
        "seed": _uniform(seed=2) - 0.5,
        "purpose": _uniform(purpose="other") - 0.5,
    }
    # The correlation of independent values has a standard error of 1 / sqrt(65536) = 0.0039.
    for name, other_TN in others.items():
        assert abs((noise_TN * other_TN).mean() * 12) < 5 * 0.0039, name
        # Repeated values: 65536 of 2**23 possible, each met again with probability 1/128 by chance.
        assert (noise_TN == other_TN).float().mean() < 1e-4, name


def test_any_bit_of_the_place_changes_half_of_the_bits() -> None:
    noise_TN = (_uniform(4096, 4) * 2**23).long()
    for bit in range(12):
        flipped_T = torch.arange(4096) ^ (1 << bit)
        different = (noise_TN ^ noise_TN[flipped_T])[..., None] >> torch.arange(23) & 1
        share_23 = different.double().mean((0, 1))
        # 16384 pairs, each counted twice: standard error 0.5 / sqrt(8192) = 0.0055.
        assert (share_23 - 0.5).abs().max() < 6 * 0.0055, bit


def test_distinct_tokens_and_columns_have_distinct_rows() -> None:
    assert len(_uniform().unique(dim=0)) == 4096
    assert len(_uniform().t().unique(dim=0)) == 16


def test_normal_and_gumbel_moments() -> None:
    ctx = make_context()
    normal_TN = normal_noise(1, "test", 4096, 16, ctx, CPU)
    gumbel_TN = gumbel_noise(1, "test", 4096, 16, ctx, CPU)
    assert normal_TN.isfinite().all() and gumbel_TN.isfinite().all()
    # Standard errors of 65536 draws: mean 1/256, variance sqrt(2)/256.
    assert abs(normal_TN.mean()) < 5 / 256 and abs(normal_TN.var() - 1) < 5 * 1.42 / 256
    # Gumbel: mean 0.5772, variance pi^2 / 6 = 1.645, fourth central moment 5.4 times its square.
    assert abs(gumbel_TN.mean() - 0.5772) < 5 * 1.283 / 256
    assert abs(gumbel_TN.var() - 1.645) < 5 * 1.645 * 2.1 / 256


def test_the_extremes_are_finite() -> None:
    # The least and the largest value that the hash can give.
    extremes = torch.tensor([0.5, 2**23 - 0.5]) * 2.0**-23
    assert (extremes > 0).all() and (extremes < 1).all()
    assert torch.special.erfinv(2 * extremes - 1).isfinite().all()
    assert (-(-extremes.log()).log()).isfinite().all()


def test_gumbel_argmax_samples_the_softmax() -> None:
    logits_E = torch.tensor([0.0, 1.0, 2.0])
    chosen_T = (logits_E + gumbel_noise(1, "test", 40000, 3, make_context(), CPU)).argmax(-1)
    shares_E = chosen_T.bincount(minlength=3) / 40000
    assert (shares_E - logits_E.softmax(-1)).abs().max() < 5 * 0.5 / 200


def test_padding_moves_nothing() -> None:
    mask_T = torch.arange(23) % 4 != 1
    padded_TN = _uniform(23, 4, padding_mask=mask_T.view(1, -1))
    assert torch.equal(padded_TN[mask_T], _uniform(int(mask_T.sum()), 4))
    assert token_positions(5, torch.tensor([False, True, False, True, True]), CPU).tolist() == [0, 0, 0, 1, 2]


def test_replayed_and_without_generators() -> None:
    state = torch.get_rng_state()
    assert torch.equal(_uniform(step=3), _uniform(step=3))
    assert torch.equal(torch.get_rng_state(), state)
    # A batch's tokens and an expert's column do not depend on how many others there are.
    assert torch.equal(_uniform(10, 3), _uniform(64, 8)[:10, :3])
    for T, N in itertools.product((0, 1), (0, 1)):
        assert _uniform(T, N).shape == (T, N)


def _share(rank: int, ranks: int) -> Tensor:
    ctx: LayerContext = make_context(group=torch.distributed.group.WORLD)
    return uniform_noise(1, "test", 8, 3, ctx, CPU)


@pytest.mark.distributed
def test_two_ranks_draw_what_one_draws() -> None:
    assert torch.equal(torch.cat(run_ranks(_share, 2)), _uniform(16, 3))
