"""What is observed of routers: what their weights sum to, and whether equal rows stay together.

Letters: E experts, G experts of a group, K experts a token.
"""

from __future__ import annotations

import pytest
import torch

from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.expert_choice_config import ExpertChoiceConfig
from moe.routers.configs.forced_config import ForcedConfig
from moe.routers.configs.hash_config import HashConfig
from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from moe.routers.configs.relu_config import ReLUConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.gates import keeps_groups, observe
from tests.grid import each
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, label, make_router

pytestmark = pytest.mark.usefixtures("one_thread")


@each("config", ROUTER_CONFIGS, ids=label)
def test_declared_sums_are_observed(config: RouterConfig) -> None:
    if config.check(4):
        pytest.skip("not over four experts")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gates, router = observe(config, 4), make_router(config)
    assert gates.top_k == router.top_k and gates.has_rows == (router.rows_ED() is not None)
    if router.weights_sum_to_one:
        assert (gates.total, gates.constant) == (1.0, True)
    torch.set_rng_state(before)
    observe(config, 4)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


@each(
    ("config", "total", "constant"),
    [
        # A softmax over eight equal logits gives 1/8 each, a sigmoid of 0 a half.
        (TopKConfig(top_k=2, renormalise=False), 2 / 8, False),
        (TopKConfig(top_k=3, score="sigmoid", renormalise=False), 3 / 2, False),
        (DeepSeekV3Config(routed_scaling=2.5), 2.5, True),
        # Renormalised, and yet tokens that no expert takes weigh nothing.
        (ExpertChoiceConfig(renormalise=True), None, False),
        (ReLUConfig(), None, False),
        (HashConfig(), 1.0, True),
    ],
    ids=lambda value: label(value) if isinstance(value, RouterConfig) else None,
)
def test_sums(config: RouterConfig, total: float | None, constant: bool) -> None:
    gates = observe(config, 8)
    assert gates.constant == constant
    assert gates.total == (total if total is None else pytest.approx(total, rel=1e-9))


def test_weights_that_are_alike() -> None:
    assert observe(ForcedConfig(top_k=4), 4).alike == pytest.approx(0.25)
    assert observe(TopKConfig(top_k=4), 4).alike is None


def test_groups() -> None:
    for training in (True, False):
        assert keeps_groups(TopKConfig(top_k=4), 8, 2, training)
        assert not keeps_groups(TopKConfig(top_k=3), 8, 2, training)
        assert keeps_groups(NoisyTopKConfig(), 8, 2, training) == (not training)
