"""What an upcycling method decides: for every expert, which dense neurons it takes and what is done to them.

A plan holds no weights. Whoever carries it out (`moe.upcycle.build_experts`) sees one matrix at a time, so
that one method serves a model in memory, a converter that streams files, and a rank that holds a few experts.

Letters: D model width, E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor

from moe.routing.draws import seeded_generator

Matrix = Literal["gate", "up", "down"]
Moments = Literal["matrix", "slice"]


@dataclass(frozen=True)
class FFNShape:
    """What a method may know of a dense network before its weights are read.

    Attributes:
        width: F.
        model_width: D.
        gated: Whether there is a gate beside the up projection.
        up_bias: Gate and up projection have biases.
        down_bias: The down projection has one.
        activation: A key of `kernels.activations.ACTIVATIONS`.
    """

    width: int
    model_width: int
    gated: bool
    activation: str
    up_bias: bool = False
    down_bias: bool = False

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Those that the network has."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


@dataclass(frozen=True)
class Drawn:
    """Neurons whose weights are drawn anew, from a normal distribution; their biases become 0.

    Attributes:
        positions: For each matrix, int64 positions among the expert's neurons; None draws all of them.
        std: Standard deviation, around 0; None takes mean and deviation of the dense weights.
        moments: Of which dense weights: the whole ``matrix``, or the ``slice`` that is replaced.
    """

    positions: Mapping[Matrix, Tensor] | None = None
    std: float | None = None
    moments: Moments = "matrix"


@dataclass(frozen=True)
class Noise:
    """Normal noise added to weights.

    Attributes:
        std: Its standard deviation; a share of the dense matrix' deviation when `relative`.
        relative: See `std`.
        positions: As in `Drawn`.
    """

    std: float
    relative: bool = True
    positions: Mapping[Matrix, Tensor] | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """How one expert, routed or shared, comes out of a dense network.

    Neuron i is row i of gate and up projection and column i of the down projection.

    Attributes:
        width: F of the expert.
        neurons_F: Its neurons by their dense index: a slice, or ``[F]`` int64 in the expert's order. None
            when no dense neuron is read, since all weights are drawn.
        source: Which of the dense networks, for methods that have several.
        scale: Factor of each matrix, 1 where not named. Biases of gate and up follow their matrix.
        drawn: Weights that are drawn anew.
        noise: Added to the others.
        down_bias: Factor of the dense down bias.
    """

    width: int
    neurons_F: slice | Tensor | None
    source: int = 0
    scale: Mapping[Matrix, float] = field(default_factory=dict)
    drawn: Drawn | None = None
    noise: Noise | None = None
    down_bias: float = 1.0

    def __post_init__(self) -> None:
        draws_all = self.drawn is not None and self.drawn.positions is None
        assert (self.neurons_F is None) <= draws_all, "an expert needs dense neurons or draws them all"
        if isinstance(self.neurons_F, slice):
            start, stop, step = self.neurons_F.start, self.neurons_F.stop, self.neurons_F.step
            assert step in (None, 1) and stop - start == self.width, (self.neurons_F, self.width)
        elif self.neurons_F is not None:
            assert self.neurons_F.shape == (self.width,), (self.neurons_F.shape, self.width)

    def keeps(self, matrix: Matrix) -> bool:
        """Whether the expert's matrix is made of the dense weights as they are, in their order."""
        in_order = isinstance(self.neurons_F, slice)
        return in_order and self.scale.get(matrix, 1.0) == 1.0 and self.drawn is None and self.noise is None


@dataclass(frozen=True)
class NeuronRows:
    """Rows of a router that come out of the dense network; who carries the plan out reads them.

    Row e is the mean of the rows of some neurons. Letters here: E experts, N neurons that one stands for.

    Attributes:
        matrix: ``gate`` or ``up``, of dense network 0.
        neurons_EN: ``[E, N]`` int64.
        normalised: Whether each of these rows is scaled to length 1 first.
    """

    matrix: Matrix
    neurons_EN: Tensor
    normalised: bool = True


@dataclass(frozen=True)
class RouterStart:
    """How a router begins, for methods that care.

    Attributes:
        group_size: So many consecutive experts share a row. 1: every expert has its own.
        rows_ED: ``[E, D]`` the rows themselves; None leaves them as the router draws them.
        tensors: Other parameters of the router, by their name in it.
    """

    group_size: int = 1
    rows_ED: Tensor | NeuronRows | None = None
    tensors: Mapping[str, Tensor | NeuronRows] = field(default_factory=dict)

    @property
    def matrices(self) -> frozenset[Matrix]:
        """The dense matrices whose rows it names."""
        values = (self.rows_ED, *self.tensors.values())
        return frozenset(value.matrix for value in values if isinstance(value, NeuronRows))


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a mixture.

    Attributes:
        experts: The routed experts, E of one width.
        shared: The expert that every token uses besides; None for none.
        router: How its router begins.
    """

    experts: tuple[ExpertPlan, ...]
    shared: ExpertPlan | None = None
    router: RouterStart = field(default_factory=RouterStart)

    def __post_init__(self) -> None:
        widths = {expert.width for expert in self.experts}
        assert len(widths) == 1, f"routed experts are of one width, not of {sorted(widths)}"

    @property
    def expert_width(self) -> int:
        """F of a routed expert."""
        return self.experts[0].width


@dataclass(frozen=True)
class Draws:
    """The randomness of one layer: the same whoever draws, in whatever order."""

    seed: int
    layer: int

    def generator(self, *what: object) -> Generator:
        """A generator for one purpose in this layer."""
        return seeded_generator(self.seed, "upcycle", self.layer, *what)

    def of_matrix(self, expert: int | None, matrix: Matrix) -> Generator:
        """For the weights of one expert's matrix; None is the shared expert."""
        return self.generator("weights", "shared" if expert is None else expert, matrix)
