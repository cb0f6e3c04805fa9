"""Gathers all statistics that a method asks for of one layer, in as many passes as they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed import ProcessGroup

from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws, FFNShape
from moe.upcycle.statistics import statistic_classes
from moe.upcycle.statistics.base import LayerBatch, Statistic


@dataclass(frozen=True)
class Wanted:
    """What a method asks for.

    Attributes:
        names: Of the statistics.
        options: By name, those that differ from a statistic's defaults; also of statistics that are only
            needed on the way.
    """

    names: tuple[str, ...]
    options: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = (set(self.names) | self.options.keys()) - statistic_classes().keys()
        assert not unknown, f"there are no statistics called {sorted(unknown)}"

    def describe(self) -> dict[str, dict[str, int]]:
        """Every statistic that is gathered, with all its options."""
        classes = statistic_classes()
        names = [name for names in statistic_passes(self.names) for name in names]
        return {name: {**classes[name].defaults, **self.options.get(name, {})} for name in names}


def statistic_passes(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The statistics, and those that they need, in the order in which they are gathered.

    Each pass is in an order in which every statistic comes after what it needs. One that reads text comes a
    pass after what it needs; one that reads none follows at the end of the pass before.
    """
    classes = statistic_classes()
    level: dict[str, int] = {}

    def place(name: str, asked_by: tuple[str, ...] = ()) -> int:
        assert name not in asked_by, f"{name} needs itself: {asked_by}"
        if name not in level:
            needed = [place(other, (*asked_by, name)) for other in classes[name].after]
            level[name] = max(needed, default=-classes[name].reads_text) + classes[name].reads_text
        return level[name]

    for name in names:
        place(name)
    count = max(level.values(), default=-1) + 1
    return tuple(tuple(name for name in level if level[name] == number) for number in range(count))


class LayerStatistics:
    """One layer's statistics: ``begin``, ``update`` with the whole text and ``finish``, for each pass.

    Attributes:
        passes: Names by pass.
        results: Of the passes that are finished, those asked for and those that they need.
    """

    def __init__(self, ffn: FFNWeights, wanted: Wanted, draws: Draws) -> None:
        self.ffn = ffn
        self.wanted = wanted
        self.draws = draws
        self.passes = statistic_passes(wanted.names)
        self.results: dict[str, Tensor] = {}
        self._open: dict[str, Statistic] = {}

    def _make(self, name: str) -> Statistic:
        cls = statistic_classes()[name]
        earlier = {other: self.results[other] for other in cls.after}
        return cls(self.ffn, self.wanted.options.get(name, {}), earlier, self.draws)

    def begin(self, number: int) -> None:
        """Opens the statistics of a pass."""
        classes = statistic_classes()
        self._open = {name: self._make(name) for name in self.passes[number] if classes[name].reads_text}

    def update(self, batch: LayerBatch) -> None:
        """Takes in a batch."""
        real = batch.real()
        for statistic in self._open.values():
            statistic.update(real)

    def finish(self, number: int, group: ProcessGroup | None = None) -> None:
        """Closes a pass: `results` has its statistics, over all ranks of the group. Collective."""
        for name in self.passes[number]:
            statistic = self._open[name].merge(group) if name in self._open else self._make(name)
            self.results[name] = statistic.result()
        self._open = {}

    def state(self, group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Everything that `load` needs to go on within a pass, of all ranks together. Collective."""
        state = {f"done/{name}": value for name, value in self.results.items()}
        for name, statistic in self._open.items():
            state |= {f"open/{name}/{part}": value for part, value in statistic.merged(group).items()}
        return state

    def load(self, number: int, state: Mapping[str, Tensor], *, takes_sums: bool) -> None:
        """Goes on within a pass.

        Args:
            number: Of the pass.
            state: Of `state`.
            takes_sums: Whether this rank takes over what all ranks had; exactly one does.
        """
        self.results = {
            key.removeprefix("done/"): value for key, value in state.items() if key.startswith("done/")
        }
        self.begin(number)
        for name, statistic in self._open.items() if takes_sums else ():
            head = f"open/{name}/"
            statistic.load(
                {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
            )

    def asked_for(self) -> dict[str, Tensor]:
        """The results, without those that were only needed on the way."""
        return {name: self.results[name] for name in self.wanted.names}


def reads_text(names: Iterable[str]) -> bool:
    """Whether any of the statistics needs a pass over the text."""
    return any(statistic_classes()[name].reads_text for name in names)


def needs_gradient(names: Iterable[str]) -> bool:
    """Whether any of them needs a backward pass."""
    return any(statistic_classes()[name].needs_gradient for name in names)


def statistic_bytes(shape: FFNShape, wanted: Wanted) -> dict[str, int]:
    """Memory of each statistic of one layer, those that are needed on the way included."""
    classes = statistic_classes()
    return {name: classes[name].num_bytes(shape, options) for name, options in wanted.describe().items()}
