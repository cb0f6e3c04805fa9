"""What a router tells its contract tests: see `tests/moe/routers/router_cases/`, one file a router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig

#: The properties that a router may be excused from, each by what a router is that cannot have it.
EXCUSES = {
    "permutation": "the order of the tokens matters (capacity by position, an auction that breaks ties)",
    "relabelling": "the experts are not alike (a tree, a table of expert ids, learned codes)",
    "finite_differences": "the gradient is an estimate on purpose (straight-through, detached potentials)",
    "draws": "training draws noise for each token, so that other tokens have other noise",
    "inexactness": "copies may be exact by chance though the weights of a token need not sum to 1",
    "ranks": "what it keeps between steps depends on how the step is cut into micro-batches",
}


@dataclass(frozen=True)
class RouterCase:
    """One router's configs for the contract, and what it cannot be held to.

    Attributes:
        variants: Interesting configs besides the default.
        excused: A key of `EXCUSES` -> why, in this router's own words.
        trained_by_losses: Parameters that the combine weights give no gradient; a named loss must.
        unused_in_evaluation: Parameters that evaluation leaves out, such as those of noise.
        method: The upcycling method that its layers are tested with; copies when None.
    """

    variants: tuple[RouterConfig, ...] = ()
    excused: Mapping[str, str] = field(default_factory=dict)
    trained_by_losses: frozenset[str] = frozenset()
    unused_in_evaluation: frozenset[str] = frozenset()
    method: UpcycleConfig | None = None

    def __post_init__(self) -> None:
        unknown = self.excused.keys() - EXCUSES.keys()
        assert not unknown and all(self.excused.values()), f"no such excuse, or no reason: {unknown}"
