"""The contract of every router that discovery finds: what it draws, keeps, saves and agrees on.

What a router cannot be held to it says in its case, ``tests/moe/routers/router_cases/NAME.py``, with the
reason.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.routers import router_class
from moe.routers.configs import RouterConfig
from tests.distributed_helper import run_ranks
from tests.moe.routers.router_contract import (
    D,
    E,
    T,
    assert_same,
    assert_same_state,
    assert_sound,
    batch_context,
    every_config,
    is_excused,
    route,
    state_of,
    tokens,
    train_step,
)
from tests.moe.routers.routing_cases import (
    ROUTER_CONFIGS,
    label,
    make_router,
)


@every_config
def test_reset_draws_from_the_generator_alone(config: RouterConfig) -> None:
    router = router_class(config.name)(config, D, E)

    def draw(seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.fill_(float("nan"))
            for buffer in router.buffers():
                buffer.zero_()
        torch.manual_seed(123)
        before = torch.get_rng_state()
        router.reset_parameters(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        return state_of(router)

    built = state_of(router)
    first, second, other = draw(1), draw(1), draw(2)
    assert all(value.isfinite().all() for value in first.values()), "a parameter was left as it was"
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = {name for name, value in first.items() if not torch.equal(value, other[name])}
    # What is not drawn starts from one value, so that only a router without parameters may draw nothing.
    assert drawn or not list(router.parameters())
    for name in first.keys() - drawn:
        assert torch.equal(first[name], built[name]), f"reset leaves {name} at another value than __init__"


@every_config
def test_reset_without_a_generator_follows_the_global_seed(config: RouterConfig) -> None:
    router = router_class(config.name)(config, D, E)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        router.reset_parameters()
        drawn.append(list(state_of(router).values()))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@every_config
def test_state_round_trip(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    train_step(router, [tokens(1), tokens(2)])
    other = make_router(config, D, E, seed=99)
    other.load_state_dict(router.state_dict(), strict=True)
    for training in (True, False):
        x_TD, step = tokens(3), {"step": 1}
        found = route(other.train(training), x_TD, **step)
        rule = "everything that routing depends on is a parameter or a buffer that is saved"
        assert_same(route(router.train(training), x_TD, **step), found, rule)


@every_config
def test_recomputed_and_evaluated_batches_are_not_counted(config: RouterConfig) -> None:
    parts = [tokens(1), tokens(2), 2 * tokens(3)]
    once, again = make_router(config, D, E), make_router(config, D, E)
    expected = train_step(once, parts)
    # Backward recomputes the micro-batch that is at its turn; evaluation comes in between at any time.
    route(again.eval(), tokens(8), micro_batch=1)
    route(again.train(), parts[0])
    route(again.eval(), tokens(8))
    assert_same_state(
        train_step(again, parts, [0, 0, 1, 1, 2, 2]),
        expected,
        "sums of a step are filed by micro-batch, so that one recomputed counts once",
    )
    again.eval()
    before = state_of(again)
    route(again, tokens(8), step=1)
    assert_same_state(state_of(again), before, "evaluation changes no state")


@every_config
def test_a_step_without_tokens_keeps_the_state_finite(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    router.after_optimizer_step(batch_context(router, 0, step=1))
    train_step(router, [tokens(num=0)])
    train_step(router, [tokens() * 0])
    for name, value in train_step(router, [tokens() * 1e5]).items():
        assert value.isfinite().all(), name
    assert_sound(router, route(router.eval(), tokens()), T)


def _after_two_steps(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """Four parts of a step: two micro-batches on each of two ranks, or four on one. State of every config."""
    group = torch.distributed.group.WORLD if ranks > 1 else None
    states = {}
    for config in ROUTER_CONFIGS:
        if is_excused(config, "ranks"):
            continue
        router = make_router(config, D, E)
        for step in range(2):
            parts = [tokens(10 * step + part) for part in range(4)]
            train_step(router, parts[rank::ranks], group=group)
        states[label(config)] = state_of(router)
    return states


@pytest.mark.distributed
def test_two_ranks_keep_the_state_of_one() -> None:
    one, two = _after_two_steps(0, 1), run_ranks(_after_two_steps, 2)
    for name, expected in one.items():
        assert_same_state(two[0][name], two[1][name], f"{name}: the ranks differ")
        for key, value in expected.items():
            # Sums in another order.
            torch.testing.assert_close(two[0][name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name}: {key}")
