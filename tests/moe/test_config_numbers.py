"""Every config refuses numbers that are not finite or do not fit, by the name of the option."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from moe.attention.attention_config import AttentionConfig
from moe.errors import FieldError, Mistake
from moe.experts.experts_config import ExpertsConfig
from moe.experts.lora_config import LoraConfig
from moe.routers import router_classes
from moe.routers.configs.topk_config import TopKConfig
from moe.routing.permutation_config import PermutationConfig
from moe.types import Config
from moe.upcycle import upcycle_methods
from tests.grid import each

CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(router.config_class for router in router_classes().values()),
        *(method.config_class for method in upcycle_methods().values()),
        ExpertsConfig,
        LoraConfig,
        PermutationConfig,
    )
}


def numbers_of(cls: type[Any], kind: type[float]) -> list[str]:
    """The fields whose type is, or may be, a number of a kind."""
    return [f.name for f in dataclasses.fields(cls) if kind.__name__ in str(f.type).split(" | ")]


def mistakes_of(cls: type[Any], **fields: Any) -> list[Mistake]:
    """What is wrong with a config of these fields."""
    with pytest.raises(FieldError) as found:
        cls(**fields)
    return list(found.value.mistakes)


@each("name", sorted(CLASSES))
def test_every_option_of_every_config(name: str) -> None:
    cls = CLASSES[name]
    for option in numbers_of(cls, float):
        for value in (math.nan, math.inf, -math.inf):
            mistakes = mistakes_of(cls, **{option: value})
            assert [m.path for m in mistakes] == [option] and "not finite" in mistakes[0].rule, option
        for value in (1e30, -1e30):
            mistakes = mistakes_of(cls, **{option: value})
            assert [m.path for m in mistakes] == [option] and "larger than any" in mistakes[0].rule, option
    for option in numbers_of(cls, int):
        for value in (10**30, -(10**30)):
            mistakes = mistakes_of(cls, **{option: value})
            assert [m.path for m in mistakes] == [option] and "64 bits" in mistakes[0].rule, option


def test_attention() -> None:
    assert [m.path for m in mistakes_of(AttentionConfig, router=TopKConfig(), scale_factor=math.inf)] == [
        "scale_factor"
    ]


def test_there_are_numbers_to_check() -> None:
    assert sum(len(numbers_of(cls, float)) for cls in CLASSES.values()) > 60
    assert sum(len(numbers_of(cls, int)) for cls in CLASSES.values()) > 40


@dataclass(frozen=True)
class Plain(Config):
    """No rules of its own."""

    rate: float | None = 0.1
    seed: int = 0
    flag: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    peaks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruled(Plain):
    """Rules that do not call those of the base, and cannot take what is no number."""

    def __post_init__(self) -> None:
        assert self.rate is not None and int(self.rate) >= 0


@each("cls", [Plain, Ruled])
def test_lists_mappings_and_all_mistakes_at_once(cls: type[Any]) -> None:
    nan = math.nan
    assert [m.path for m in mistakes_of(cls, rate=nan, betas=[0.9, math.inf], seed=2**63)] == [
        "rate",
        "seed",
        "betas",
    ]
    assert [m.path for m in mistakes_of(cls, peaks={"a": 1.0, "b": nan})] == ["peaks"]
    assert cls(seed=2**63 - 1, rate=9e18).seed == 2**63 - 1
    assert "rate=nan: the number is not finite" in str(mistakes_of(cls, rate=nan)[0])


def test_configs_that_are_read_from_files() -> None:
    with pytest.raises(ValidationError, match="rate=inf: the number is not finite"):
        TypeAdapter(Ruled).validate_python({"rate": "inf"})
    assert Plain(rate=None).rate is None


def test_the_number_of_experts_is_bounded() -> None:
    (mistake,) = mistakes_of(upcycle_methods()["copy"].config_class, num_experts=10**9)
    assert mistake.path == "num_experts" and "at most 65536" in mistake.rule
