"""All layouts equal one rank: losses, gradients by name, norms, load, weights, checkpoints.

The bounds are those of `test_native_ranks`: the order of fp32 sums is all that differs.
"""

from __future__ import annotations

import pytest
import torch

from moe.errors import ModelError
from moe.routers.configs.avg_k_config import AvgKConfig
from moe.routers.configs.topk_config import TopKConfig
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.engines.native.expert_parallel import shard_dim
from recipes.engines.native.native_engine import NativeConfig, NativeEngine
from recipes.engines.native.tensor_parallel import _require_known, attention_mistakes, attention_plan
from recipes.models.hf.ffn_blocks import decoder_blocks
from tests.conftest import random_model
from tests.moe.dispatch.dispatch_cases import make_experts
from tests.recipes.engines import expert_parallel_cases
from tests.recipes.engines.engine_cases import GLOBAL_BATCH, SEQ_LEN
from tests.recipes.engines.expert_parallel_cases import REFUSING, TRAINED, Found, Layout, Read
from tests.recipes.engines.test_native_ranks import (
    ADAPTED,
    SUMS,
    check_gradients,
    check_series,
    check_weights,
    relative,
)

ranks = [pytest.mark.distributed, pytest.mark.slow]
# Who reads whose checkpoint, by number of ranks.
ONE = Layout(1)
READS: list[tuple[int, list[Read]]] = [
    (1, []),
    (4, [(ONE, Layout(4, 2)), (ONE, Layout(4, 4)), (ONE, Layout(4, 2, replicas=2, heads=2))]),
    (
        2,
        [
            (ONE, Layout(2, 2)),
            (Layout(4, 4), Layout(2, 2)),
            (Layout(4, 2), Layout(2)),
            (Layout(4, replicas=2), Layout(2, heads=2)),
            (Layout(4, 2, heads=2), Layout(2, replicas=2)),
        ],
    ),
]
ALONE_READS: list[Read] = [
    (Layout(2, 2), ONE),
    (Layout(4, 4), ONE),
    (Layout(4, 2, replicas=2), ONE),
    (Layout(2, heads=2), ONE),
    (Layout(4, 2, replicas=2, heads=2), ONE),
]
SPREAD = [(layout, name) for layout, names in TRAINED.items() if layout.ranks > 1 for name in names]


@pytest.fixture(scope="module")
def found() -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    return expert_parallel_cases.found()


class TestRanks:
    """What several processes find."""

    pytestmark = ranks

    @pytest.mark.parametrize(("layout", "name"), [pair for pair in SPREAD if pair[1] != "bf16"])
    def test_all_layouts_train_as_one_rank_does(
        self, layout: Layout, name: str, found: dict[int, list[Found]]
    ) -> None:
        one, spread = found[1][0].trained[ONE][name], found[layout.ranks][0].trained[layout][name]
        adapts = name in ("adamw", "muon", "clipped", "two_experts")
        check_gradients(one, spread, SUMS)
        check_series(one, spread, ADAPTED if adapts else SUMS)
        check_weights(one, spread, 10 * ADAPTED if adapts else SUMS)
        assert one.tokens == [GLOBAL_BATCH * SEQ_LEN] * 2
        # Ranks that see the same samples count them each.
        assert spread.tokens == [GLOBAL_BATCH * SEQ_LEN * layout.heads] * 2
        plain = {key for key, sharded in spread.notes["sharded"].items() if not sharded}
        assert all(key.endswith(".step") for key in plain), plain

    def test_all_ranks_report_the_same(self, found: dict[int, list[Found]]) -> None:
        for layout, name in SPREAD:
            first, *others = [rank.trained[layout][name] for rank in found[layout.ranks]]
            for other in others:
                assert other.series("grad_norm") == first.series("grad_norm"), (layout, name)
                assert all(torch.equal(other.weights[key], w) for key, w in first.weights.items()), name

    def test_routers_see_every_sample_once(self, found: dict[int, list[Found]]) -> None:
        for layout in TRAINED:
            seen = [rank.samples[layout] for rank in found[layout.ranks]]
            wanted = [
                [r for r in range(layout.ranks) if (r - me) % layout.heads == 0] for me in range(layout.ranks)
            ]
            assert seen == wanted, layout

    @pytest.mark.parametrize("layout", [Layout(2, 2), Layout(2, heads=2)])
    def test_bf16_is_as_near_to_fp32_as_on_one_rank(
        self, layout: Layout, found: dict[int, list[Found]]
    ) -> None:
        # What bf16 costs is measured on one rank; several may be off by twice as much.
        exact, one = found[1][0].trained[ONE]["fsdp"], found[1][0].trained[ONE]["bf16"]
        spread = found[2][0].trained[layout]["bf16"]
        for name, grad in exact.grads.items():
            allowed = 2 * float((one.grads[name] - grad).norm() / grad.norm())
            assert float((spread.grads[name] - grad).norm() / grad.norm()) <= allowed, name
        dtypes = spread.notes["dtypes"]
        assert (dtypes["expert_output"], dtypes["combine_weights"]) == (torch.bfloat16, torch.float32)

    @pytest.mark.parametrize(
        ("world_size", "source", "layout"),
        [(world, *read) for world, reads in [*READS, (1, ALONE_READS)] for read in reads],
    )
    def test_a_checkpoint_is_read_by_another_layout(
        self, world_size: int, source: Layout, layout: Layout, found: dict[int, list[Found]]
    ) -> None:
        # The step behind the checkpoint, moments included, is what the writer itself did next.
        wanted = found[source.ranks][0].written[source]
        weights = found[world_size][0].read[source, layout]
        assert list(weights) == list(wanted)
        wrong = {name: relative(weights[name], weight) for name, weight in wanted.items()}
        assert {name: error for name, error in wrong.items() if error > ADAPTED} == {}

    def test_a_gradient_that_is_not_finite_on_one_rank_updates_none(
        self, found: dict[int, list[Found]]
    ) -> None:
        assert [rank.refused for rank in found[2]] == [dict.fromkeys(REFUSING, True)] * 2

    def test_spread_heads_have_the_gradients_of_plain_torch(self, found: dict[int, list[Found]]) -> None:
        for rank in found[2]:
            assert {name: error for name, error in rank.families.items() if error[0] > SUMS} == {}
            assert len(rank.families) == 3

    def test_ranks_that_share_heads_draw_the_same_noise(self, found: dict[int, list[Found]]) -> None:
        first, second = (rank.noisy for rank in found[2])
        assert first is not None and first == second
        # Of each of two layers the output of attention, and in backward the gradient of its input.
        assert first[1] == 2 * 2


def test_what_cannot_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert NativeEngine.check(NativeConfig(expert_parallel=2, device="cpu")) is None
    unsupported_reason = NativeEngine.check(NativeConfig(expert_parallel=3, device="cpu"))
    assert "expert_parallel=3: 4 ranks do not divide into groups of 3" in str(unsupported_reason)

    def mistakes(spread: int, experts: int, router: TopKConfig | AvgKConfig) -> list[str]:
        config = NativeConfig(expert_parallel=spread)
        return [str(mistake) for mistake in config.check_moe(experts, router)]

    assert mistakes(2, 8, TopKConfig()) == mistakes(1, 7, AvgKConfig()) == []
    uneven, reads = mistakes(2, 7, AvgKConfig())
    assert "engine.expert_parallel=2: the 7 experts of upcycle.num_experts do not divide" in uneven
    assert "router=avg_k reads the weights of all experts" in reads
    for wrong, match in (
        ({"expert_parallel": 0}, "expert_parallel=0: must be at least 1"),
        ({"expert_parallel": 2, "strategy": "ddp"}, "must be 1 under strategy=ddp"),
        ({"expert_parallel": 2, "compile": True}, "expert_parallel=2: must be 1 with compile"),
        ({"tensor_parallel": 2, "compile": True}, "tensor_parallel=2: must be 1 with compile"),
        ({"replicas": 2, "strategy": "ddp"}, "replicas=2: must be 1 under strategy=ddp"),
        ({"replicas": 0}, "replicas=0: must be at least 1"),
        ({"tensor_parallel": -1}, "tensor_parallel=-1: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            NativeConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cuts", "rule"),
    [
        ({"replicas": 3}, "replicas=3: 4 ranks do not divide into 3 groups"),
        (
            {"replicas": 2, "expert_parallel": 4},
            "expert_parallel=4: the 2 ranks of each of 2 replicas do not divide into groups of 4. Set "
            "a divisor of 2, or start a multiple of 8 ranks",
        ),
        ({"tensor_parallel": 3}, "tensor_parallel=3: 4 ranks do not divide into groups of 3"),
        ({"replicas": 2, "expert_parallel": 2, "tensor_parallel": 2}, None),
    ],
)
def test_ranks_that_do_not_divide_are_refused(
    cuts: dict[str, int], rule: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    unsupported_reason = NativeEngine.check(NativeConfig(device="cpu", **cuts))  # type: ignore[arg-type]
    assert unsupported_reason is None if rule is None else rule in str(unsupported_reason)


def test_attention_that_cannot_be_spread_is_refused() -> None:
    def rules(dense: dict[str, object], ways: int = 2) -> list[str]:
        return [str(mistake) for mistake in attention_mistakes(dense, ways)]

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert rules({"model_type": "llama"} | heads) == rules({"model_type": "gpt2"}, 1) == []
    # Norms over all heads; latent projections; no plan; no family.
    for family in ("olmo2", "deepseek_v2", "gpt2", "nonsense"):
        assert (
            f"transformers has no plan that shards the attention of '{family}'"
            in rules({"model_type": family})[0]
        )
    queries, keys = rules({"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3}, 4)
    assert "engine.tensor_parallel=4: the 6 attention heads do not divide over 4 ranks" in queries
    assert "the 3 key-value heads" in keys
    run = parse_config(compose_config(["+recipe=upcycle", "engine.tensor_parallel=3"]))
    assert "the 4 attention heads" in str(NativeEngine.check_run(run.engine, run)[0])
    run = parse_config(compose_config(["+recipe=upcycle", "engine.tensor_parallel=2", "attention=moe"]))
    assert "attention experts do not support tensor parallelism" in str(
        NativeEngine.check_run(run.engine, run)[0]
    )


def test_projections_that_the_plan_does_not_know_are_refused() -> None:
    plan = attention_plan("llama")
    assert plan is not None and (plan.module, plan.rows) == ("self_attn", "o_proj")
    model = random_model("llama")
    attention = decoder_blocks(model, model.config)[0].self_attn
    _require_known(attention, plan, 2)
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with pytest.raises(ModelError, match="it is not known how to shard sinks, q_proj of LlamaAttention"):
        _require_known(attention, plan, 2)


def test_experts_that_no_axis_divides_are_refused() -> None:
    experts = make_experts(True, torch.float32)  # 8 experts, weights of 10 and 6 rows
    assert (shard_dim(experts, 4, 2), shard_dim(experts, 2, 8)) == (0, 1)
    with pytest.raises(
        ModelError, match=r"neither the 1 experts of a rank nor the rows of their weights .*6"
    ):
        shard_dim(experts, 4, 8)
