"""Which layers of a host become mixtures."""

from __future__ import annotations

import pytest

from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.layer_choice import LayerChoice, parse_layers


@pytest.mark.parametrize(
    ("layers", "num_layers", "picked"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("every:1", 3, [0, 1, 2]),
        ("every:2", 5, [0, 2, 4]),
        ("every:2:1", 5, [1, 3]),
        ("every:3:4", 12, [4, 7, 10]),
        ("every:9", 5, [0]),
        ("last:2", 5, [3, 4]),
        ("last:5", 5, [0, 1, 2, 3, 4]),
        ("inner:1", 5, [1, 2, 3]),
        ("inner:2", 5, [2]),
        ([2, 0], 3, [0, 2]),
        ([4], 5, [4]),
    ],
)
def test_picked_layers(layers: str | list[int], num_layers: int, picked: list[int]) -> None:
    assert parse_layers(layers).pick(num_layers) == picked
    assert CopyConfig(layers=layers).layer_choice.pick(num_layers) == picked


@pytest.mark.parametrize(
    "layers",
    ["", "All", "every", "every:", "every:0", "every:-1", "every:2:", "every:2:-1", "every:2:1:1", "every:x"]
    + [
        "every:02",
        "last",
        "last:",
        "last:0",
        "last:-1",
        " all",
        "all\n",
        "last:1\n",
        "inner",
        "inner:0",
        "0,1",
        "[0,1]",
        "first:2",
    ],
)
def test_unknown_forms_are_refused_with_the_known_ones(layers: str) -> None:
    with pytest.raises(
        ValueError, match=r"none of the known forms\. Use all, every:N, .*last:N, inner:N, or a list"
    ):
        parse_layers(layers)


@pytest.mark.parametrize("layers", [[], [1, 2, 1]])
def test_lists_that_make_no_sense(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="the list is empty or names a layer twice. Use all"):
        parse_layers(layers)


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ([0, 4, 9], 4, r"layers \[4, 9\] do not exist, the model has layers 0 to 3. Use all"),
        ([-1], 4, r"layers \[-1\] do not exist"),
        ("last:5", 4, "last:5 asks for more than the model's 4 layers. Use all"),
        ("every:2:4", 4, "no layer is left of the model's 4. Use all"),
        ("inner:2", 4, "no layer is left of the model's 4"),
        ("all", 0, "no layer is left of the model's 0"),
    ],
)
def test_what_the_host_does_not_have(layers: str | list[int], num_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(layers).pick(num_layers)


def test_choices_compare_by_value() -> None:
    assert parse_layers("every:2:1") == LayerChoice(every=2, offset=1)
    assert parse_layers("all") == parse_layers("every:1") == LayerChoice()
