"""Gathering of all statistics that a method needs of one layer, in as many passes as they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed import ProcessGroup

from moe.experts.weights import FFNWeights
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics import statistic_classes
from moe.upcycle.statistics.base import LayerBatch, Statistic


@dataclass(frozen=True)
class Wanted:
    """Statistics that a method asks for.

    Attributes:
        names: Names of the statistics.
        options: Options by statistic that differ from its defaults, intermediate statistics included.
    """

    names: tuple[str, ...]
    options: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = (set(self.names) | self.options.keys()) - statistic_classes().keys()
        assert not unknown, f"there are no statistics called {sorted(unknown)}"

    def describe(self) -> dict[str, dict[str, int]]:
        """Returns every statistic that is gathered, with all its options."""
        classes = statistic_classes()
        names = [name for names in statistic_passes(self.names) for name in names]
        return {name: {**classes[name].defaults, **self.options.get(name, {})} for name in names}


def statistic_passes(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the statistics, and those that they need, by pass and in the order of gathering.

    Within a pass every statistic follows those that it needs. One that reads text comes a pass later than
    those that it needs; one that reads none follows at the end of their pass.
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
    """Statistics of one layer: ``begin``, ``update`` with the whole text and ``finish``, for each pass.

    Attributes:
        passes: Names by pass.
        results: Results of finished passes, intermediate ones included.
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
        """Adds a batch."""
        real = batch.real()
        for statistic in self._open.values():
            statistic.update(real)

    def finish(self, number: int, group: ProcessGroup | None = None) -> None:
        """Closes a pass and puts its statistics, over all ranks of the group, into `results`. Collective."""
        for name in self.passes[number]:
            statistic = self._open[name].merge(group) if name in self._open else self._make(name)
            self.results[name] = statistic.result()
        self._open = {}

    def state(self, group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Returns all that `load` needs to continue within a pass, of all ranks together. Collective."""
        state = {f"done/{name}": value for name, value in self.results.items()}
        for name, statistic in self._open.items():
            state |= {f"open/{name}/{part}": value for part, value in statistic.merged(group).items()}
        return state

    def load(self, number: int, state: Mapping[str, Tensor], *, takes_sums: bool) -> None:
        """Continues within a pass.

        Args:
            number: Number of the pass.
            state: Result of `state`.
            takes_sums: True on the one rank that adopts the joint state of all ranks.
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
        """Returns the results without intermediate ones."""
        return {name: self.results[name] for name in self.wanted.names}


def reads_text(names: Iterable[str]) -> bool:
    """Returns True if any of the statistics needs a pass over the text."""
    return any(statistic_classes()[name].reads_text for name in names)


def needs_gradient(names: Iterable[str]) -> bool:
    """Returns True if any of the statistics needs a backward pass."""
    return any(statistic_classes()[name].needs_gradient for name in names)


def statistic_bytes(shape: FFNShape, wanted: Wanted) -> dict[str, int]:
    """Returns the memory of each statistic of one layer, intermediate ones included."""
    classes = statistic_classes()
    return {name: classes[name].num_bytes(shape, options) for name, options in wanted.describe().items()}
