"""Spread experts equal experts on every rank: losses, gradients by name, norms, load, weights, checkpoints.

The bounds are those of `test_native_ranks`: the order of fp32 sums is all that differs.
"""

from __future__ import annotations

import pytest
import torch

from moe.errors import HostError
from moe.routers.avg_k import AvgKConfig
from moe.routers.topk import TopKConfig
from recipes.engines.expert_parallel import cut_dim
from recipes.engines.native import NativeConfig, NativeEngine
from tests.distributed_helper import run_ranks
from tests.engines.engine_cases import GLOBAL_BATCH, SEQ_LEN
from tests.engines.expert_parallel_cases import TRAINED, Found, Layout, work
from tests.engines.test_native_ranks import (
    ADAPTED,
    SUMS,
    check_gradients,
    check_series,
    check_weights,
    relative,
)
from tests.moe.dispatch_cases import make_experts

ranks = [pytest.mark.distributed, pytest.mark.slow]
# Who reads whose checkpoint, in the order in which the processes are started.
READS: list[tuple[int, list[tuple[Layout, int]]]] = [
    (1, []),
    (4, [((1, 1), 2), ((1, 1), 4)]),
    (2, [((1, 1), 2), ((4, 4), 2), ((4, 2), 1)]),
]
ALONE_READS: list[tuple[Layout, int]] = [((2, 2), 1), ((4, 4), 1)]
SPREAD = [(layout, name) for layout, names in TRAINED.items() if layout[1] > 1 for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    done = {world: run_ranks(work, world, folder, reads, True, timeout=300.0) for world, reads in READS}
    # Once more alone, for what the others have written.
    done[1][0].read |= run_ranks(work, 1, folder, ALONE_READS, False)[0].read
    return done


class TestRanks:
    """What several processes find."""

    pytestmark = ranks

    @pytest.mark.parametrize(("layout", "name"), [pair for pair in SPREAD if pair[1] != "bf16"])
    def test_spread_experts_train_as_one_rank_does(
        self, layout: Layout, name: str, found: dict[int, list[Found]]
    ) -> None:
        one, spread = found[1][0].trained[1][name], found[layout[0]][0].trained[layout[1]][name]
        adapts = name in ("adamw", "muon", "clipped", "two_experts")
        check_gradients(one, spread, SUMS)
        check_series(one, spread, ADAPTED if adapts else SUMS)
        check_weights(one, spread, 10 * ADAPTED if adapts else SUMS)
        assert spread.tokens == one.tokens == [GLOBAL_BATCH * SEQ_LEN] * 2
        plain = {key for key, sharded in spread.notes["sharded"].items() if not sharded}
        assert all(key.endswith(".step") for key in plain), plain

    def test_all_ranks_report_the_same(self, found: dict[int, list[Found]]) -> None:
        for layout, name in SPREAD:
            first, *others = [rank.trained[layout[1]][name] for rank in found[layout[0]]]
            for other in others:
                assert other.series("grad_norm") == first.series("grad_norm"), (layout, name)
                assert all(torch.equal(other.weights[key], w) for key, w in first.weights.items()), name

    def test_bf16_is_as_near_to_fp32_as_on_one_rank(self, found: dict[int, list[Found]]) -> None:
        # What bf16 costs is measured on one rank; spread experts may be off by twice as much.
        exact, one = found[1][0].trained[1]["fsdp"], found[1][0].trained[1]["bf16"]
        spread = found[2][0].trained[2]["bf16"]
        for name, grad in exact.grads.items():
            allowed = 2 * float((one.grads[name] - grad).norm() / grad.norm())
            assert float((spread.grads[name] - grad).norm() / grad.norm()) <= allowed, name
        dtypes = spread.notes["dtypes"]
        assert (dtypes["expert_output"], dtypes["combine_weights"]) == (torch.bfloat16, torch.float32)

    @pytest.mark.parametrize(
        ("world_size", "source", "spread"),
        [(world, *read) for world, reads in [*READS, (1, ALONE_READS)] for read in reads],
    )
    def test_a_checkpoint_is_read_by_another_layout(
        self, world_size: int, source: Layout, spread: int, found: dict[int, list[Found]]
    ) -> None:
        # The step behind the checkpoint, moments included, is what the writer itself did next.
        wanted = found[source[0]][0].written[source]
        weights = found[world_size][0].read[source, spread]
        assert list(weights) == list(wanted)
        wrong = {name: relative(weights[name], weight) for name, weight in wanted.items()}
        assert {name: error for name, error in wrong.items() if error > ADAPTED} == {}

    def test_a_gradient_that_is_not_finite_on_one_rank_updates_none(
        self, found: dict[int, list[Found]]
    ) -> None:
        assert [rank.refused for rank in found[2]] == [True, True]


def test_what_cannot_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert NativeEngine.check(NativeConfig(expert_parallel=2, device="cpu")) is None
    refusal = NativeEngine.check(NativeConfig(expert_parallel=3, device="cpu"))
    assert (
        refusal is not None and "expert_parallel=3: 4 ranks do not divide into groups of so many" in refusal
    )

    def mistakes(spread: int, experts: int, router: TopKConfig | AvgKConfig) -> list[str]:
        config = NativeConfig(expert_parallel=spread)
        return [str(mistake) for mistake in NativeEngine.check_mixture(config, experts, router)]

    assert mistakes(2, 8, TopKConfig()) == mistakes(1, 7, AvgKConfig()) == []
    uneven, reads = mistakes(2, 7, AvgKConfig())
    assert "engine.expert_parallel=2: the 7 experts of upcycle.num_experts do not divide" in uneven
    assert "router=avg_k reads the weights of all experts" in reads
    for wrong, match in (
        ({"expert_parallel": 0}, "expert_parallel=0 must be at least 1"),
        ({"expert_parallel": 2, "strategy": "ddp"}, "must be 1 under strategy=ddp"),
        ({"expert_parallel": 2, "compile": True}, "must be 1 with compile"),
    ):
        with pytest.raises(ValueError, match=match):
            NativeConfig(**wrong)  # type: ignore[arg-type]


def test_experts_that_no_axis_divides_are_refused() -> None:
    experts = make_experts(True, torch.float32)  # 8 experts, weights of 10 and 6 rows
    assert (cut_dim(experts, 4, 2), cut_dim(experts, 2, 8)) == (0, 1)
    with pytest.raises(HostError, match=r"neither the 1 experts of a rank nor the rows of their weights .*6"):
        cut_dim(experts, 4, 8)
