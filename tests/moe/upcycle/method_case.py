"""What an upcycling method tells its contract tests: see `method_cases/`, one file a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.configs import UpcycleConfig


def _nothing(ffn: FFNWeights) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class MethodCase:
    """One method's configs for the contract.

    Attributes:
        variants: Interesting configs besides the default.
        statistics: Made-up statistics of a network, by name, for variants that ask for some.
        job: Options of a run that go with it, on a host with two networks 48 wide.
        exact: Whether it is exact under top-2 with weights that sum to 1.
        sums: Whether it sums its experts at weight 1, and so refuses a router that averages.
        unsupported_reason: What a run on that host says, where the method is for others.
    """

    variants: tuple[UpcycleConfig, ...] = ()
    statistics: Callable[[FFNWeights], Mapping[str, Tensor]] = _nothing
    job: Mapping[str, object] = field(default_factory=dict)
    exact: bool = False
    sums: bool = False
    unsupported_reason: str | None = None
