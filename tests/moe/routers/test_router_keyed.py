"""Routing by the caller's keys, in each of their forms, and what is said of keys that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routers.configs.keyed_config import KeyedConfig
from moe.routers.keyed import KeyedRouter
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context


def _route(
    value: Tensor | None, T: int = 6, E: int = 3, mask: Tensor | None = None, **fields: Any
) -> Routing:
    router = KeyedRouter(KeyedConfig(**fields), 4, E)
    keys = {} if value is None else {"modality": value}
    return router(torch.randn(T, 4), make_context(keys=keys, padding_mask=mask))


def _experts(*args: Any, **fields: Any) -> list[int]:
    routing = _route(*args, **fields)
    assert routing.weights_TK.tolist() == [[1.0]] * len(routing.weights_TK)
    return routing.expert_ids_TK.view(-1).tolist()


def test_keys_in_every_form() -> None:
    tokens = torch.tensor([[0, 2, 1], [1, 1, 0]])
    assert _experts(tokens) == [0, 2, 1, 1, 1, 0]
    assert _experts(tokens.to(torch.uint8)) == [0, 2, 1, 1, 1, 0]
    # One for each of two sequences of three tokens
    assert _experts(torch.tensor([2, 0])) == [2, 2, 2, 0, 0, 0]
    masks = torch.stack([tokens == expert for expert in range(3)])
    assert _experts(masks) == [0, 2, 1, 1, 1, 0]


def test_ranges_of_a_number() -> None:
    # Below 250: expert 0; 250 to 500: 1; from 500: 2. Diffusion timesteps, one a sequence.
    assert _experts(torch.tensor([249, 500]), edges=[250, 500]) == [0, 0, 0, 2, 2, 2]
    assert _experts(torch.tensor([[0.1, 0.5, 0.9]] * 2), edges=[0.5, 0.7]) == [0, 1, 2] * 2


def test_ranges_of_token_ids() -> None:
    # Chameleon's kind of vocabulary: image tokens 4 to 8195 for expert 1, text around them for expert 0.
    router = KeyedRouter(KeyedConfig(key="token_ids", edges=[4, 8196], experts=[0, 1, 0]), 4, 2)
    ids = torch.tensor([[0, 3, 4, 100], [8195, 8196, 65535, 5]])
    found = router(torch.randn(8, 4), make_context(token_ids=ids)).expert_ids_TK.view(-1)
    assert found.tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    # Generation: one token a sequence, each by itself.
    for column in range(4):
        step = make_context(token_ids=ids[:, column : column + 1])
        alone = router.eval()(torch.randn(2, 4), step).expert_ids_TK.view(-1)
        assert alone.tolist() == found.view(2, 4)[:, column].tolist()
    assert router.config.needed_keys == frozenset()
    assert KeyedConfig().needed_keys == {"modality"}
    with pytest.raises(
        ConfigError, match="the model was given embeddings, and no ids. Call it with input_ids"
    ):
        router(torch.randn(8, 4), make_context())


def test_padding_may_have_any_key() -> None:
    mask = torch.tensor([[True, True, False]] * 2)
    assert _experts(torch.tensor([[0, 1, -100], [2, 2, 99]]), mask=mask) == [0, 1, 0, 2, 2, 0]
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[1, :, :2] = True
    assert _experts(masks, mask=mask) == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        (
            None,
            {},
            r"router.key='modality': it routes by this key of each token, and the caller gave only: none",
        ),
        (torch.zeros(6), {"key": "class"}, r"router.key='class': .* the caller gave only: modality"),
        (torch.zeros(2, 5).long(), {}, r"the key is \(2, 5\), and there are 6 tokens"),
        (torch.tensor([[0, 1, 3], [0, 0, 0]]), {}, "a token has key 3, and experts are 0 to 2"),
        (torch.tensor([[0, 1, -1], [0, 0, 0]]), {}, "a token has key -1, and experts are 0 to 2"),
        (torch.zeros(2, 3), {}, "the key is a number that is not whole, and there are no edges"),
        (torch.zeros(3, 2, 3, dtype=torch.bool), {}, "token 0 is in 0 masks, and not in one"),
        (torch.ones(3, 2, 3, dtype=torch.bool), {}, "token 0 is in 3 masks, and not in one"),
        (
            torch.ones(2, 2, 3, dtype=torch.bool),
            {},
            r"masks are \(2, 2, 3\): not one of 6 tokens for each expert",
        ),
    ],
)
def test_keys_that_do_not_fit(key: Tensor | None, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.* Set RouterContext.keys"):
        _route(key, **fields)


def test_edges_ascend_and_make_as_many_ranges_as_there_are_experts() -> None:
    with pytest.raises(ValueError, match=r"edges=\[2, 2\]: they do not ascend"):
        KeyedConfig(edges=[2, 2])
    message = str(KeyedConfig(edges=[1, 2]).check(4))
    assert "2 edges make 3 ranges, and there are 4 experts. Give 3 edges" in message
    assert KeyedConfig(edges=[1, 2]).check(3) is None
    # Two ranges may share an expert; an expert without a range would never be trained.
    assert KeyedConfig(edges=[1, 2], experts=[1, 0, 1]).check(2) is None
    for experts in ([0, 1, 0], [0, 1, 3], [0, 1, -1]):
        message = str(KeyedConfig(edges=[1, 2], experts=experts).check(3))
        assert "must name each of the 3 experts, and no other. Correct it" in message
    with pytest.raises(
        ValueError, match=r"experts=\[0, 1\]: 0 edges make 1 ranges.*\nedges=\[\]: ids of tokens"
    ):
        KeyedConfig(key="token_ids", experts=[0, 1])


def test_nothing_is_trained() -> None:
    router = KeyedRouter(KeyedConfig(), 4, 3)
    assert not router.state_dict() and router.weights_sum_to_one and router.top_k == 1
