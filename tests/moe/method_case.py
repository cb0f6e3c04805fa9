"""What an upcycling method tells its contract tests: see `tests/moe/method_cases/`, one file a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moe.upcycle import FFNWeights, UpcycleConfig


def _nothing(ffn: FFNWeights) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class MethodCase:
    """One method's configs for the contract.

    Attributes:
        variants: Interesting configs besides the default.
        statistics: Made-up statistics of a network, by name, for variants that ask for some.
    """

    variants: tuple[UpcycleConfig, ...] = ()
    statistics: Callable[[FFNWeights], Mapping[str, Tensor]] = _nothing
