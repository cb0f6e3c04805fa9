"""Experts that do not divide over the ranks are cut by their rows, and train as on one rank."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.distributed.tensor import Shard

from recipes.engines.native.expert_parallel import row_sharded
from tests.recipes.engines.engine_cases import Case, make_model
from tests.recipes.upcycling.sharded.conftest import LookOnRanks
from tests.recipes.upcycling.sharded.row_cases import OPTIMIZERS

# As on any number of ranks: sums in another order; and after optimizers that divide by small gradients.
SUMS, ADAPTED = 5e-6, 1e-4


def relative(value: Tensor, reference: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


@pytest.mark.slow
@pytest.mark.distributed
def test_three_experts_on_two_ranks(look_on_ranks: LookOnRanks) -> None:
    one = look_on_ranks(1)[0]["rows"]
    for found in (seen["rows"] for seen in look_on_ranks(2)):
        assert found["cuts"] == [(Shard(1),)] * 2 and found["held"] == [0.5, 0.5]
        for name in OPTIMIZERS:
            (losses, weights, grads), (theirs, others, their_grads) = found[name], one[name]
            assert losses == pytest.approx(theirs, rel=ADAPTED)
            wrong = {key: relative(grad, their_grads[key]) for key, grad in grads.items()}
            assert max(wrong.values()) <= SUMS, (name, wrong)
            wrong = {key: relative(weight, others[key]) for key, weight in weights.items()}
            assert max(wrong.values()) <= 10 * ADAPTED, (name, wrong)


def test_what_divides_is_cut_by_experts() -> None:
    model = make_model(Case())
    assert not row_sharded(model, 2) and not row_sharded(model, 4)
    # Neither experts nor rows divide: some ranks hold more than others.
    assert not row_sharded(model, 5)
    assert row_sharded(model, 8) == {p for _, x in model.moe_layers() for p in x.experts.parameters()}
