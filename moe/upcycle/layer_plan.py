"""Plan of an upcycled layer: the dense neurons that every expert takes, and their changes.

A plan holds no weights. It is carried out (`moe.upcycle.expert_rows`) one matrix at a time, so that one
method serves a model in memory, a converter that streams files, and a rank that holds a few experts.

Letters: D model width, E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor

from moe.routing.draws import seeded_generator
from moe.upcycle.dense_shape import Matrix

Moments = Literal["matrix", "slice"]


@dataclass(frozen=True)
class Drawn:
    """Neurons whose weights are drawn anew from a normal distribution; their biases become 0.

    Attributes:
        positions: For each matrix, int64 positions among the expert's neurons; None draws all.
        std: Standard deviation, around 0; None takes mean and deviation of the dense weights.
        moments: Dense weights behind mean and deviation: the whole ``matrix``, or the replaced ``slice``.
    """

    positions: Mapping[Matrix, Tensor] | None = None
    std: float | None = None
    moments: Moments = "matrix"


@dataclass(frozen=True)
class Noise:
    """Normal noise added to weights.

    Attributes:
        std: Standard deviation of the noise.
        relative: Measures `std` in units of the dense matrix's deviation.
        positions: As in `Drawn`.
    """

    std: float
    relative: bool = True
    positions: Mapping[Matrix, Tensor] | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """Recipe for one expert, routed or shared, out of a dense network.

    Neuron i is row i of gate and up projection and column i of the down projection.

    Attributes:
        width: F of the expert.
        neurons_F: Dense indices of its neurons: a slice, or ``[F]`` int64 in the expert's order. None if all
            weights are drawn, so that no dense neuron is read.
        source: Number of the dense network, for methods with several.
        scale: Factor on each matrix, 1 by default. Biases of gate and up follow their matrix.
        drawn: Weights that are drawn anew.
        noise: Noise added to the other weights.
        down_bias: Factor on the dense down bias.
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
        """Returns True if the expert's matrix consists of unchanged dense weights in their order."""
        in_order = isinstance(self.neurons_F, slice)
        return in_order and self.scale.get(matrix, 1.0) == 1.0 and self.drawn is None and self.noise is None


@dataclass(frozen=True)
class NeuronRows:
    """Rows of a router that are read from the dense network when the plan is carried out.

    Row e is the mean of the rows of some neurons. Letters here: E experts, N neurons averaged for each.

    Attributes:
        matrix: ``gate`` or ``up``, of dense network 0.
        neurons_EN: ``[E, N]`` int64.
        normalised: Scales each of these rows to length 1 first.
    """

    matrix: Matrix
    neurons_EN: Tensor
    normalised: bool = True


@dataclass(frozen=True)
class RouterStart:
    """Initial parameters of a router that a method prescribes.

    Attributes:
        group_size: Number of consecutive experts that share a row. 1: every expert has its own.
        rows_ED: ``[E, D]`` rows; None leaves them as the router draws them.
        tensors: Other parameters, by their name in the router.
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
    """Plan of one MoE layer.

    Attributes:
        experts: The routed experts, E of one width.
        shared: The expert that every token uses in addition; None without one.
        router: Initial parameters of its router.
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
    """Randomness of one layer, independent of who draws and in which order."""

    seed: int
    layer: int

    def generator(self, *what: object) -> Generator:
        """Returns a generator for one purpose in this layer."""
        return seeded_generator(self.seed, "upcycle", self.layer, *what)

    def of_matrix(self, expert: int | None, matrix: Matrix) -> Generator:
        """Returns the generator for one expert's matrix; None means the shared expert."""
        return self.generator("weights", "shared" if expert is None else expert, matrix)
