"""What every scaling law is: inputs, coefficients with their domains, a stable log-loss, published values.

Letters: R runs, P parameters of a law (its coefficients), S sets of coefficients side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.scaling_laws.columns import COLUMNS

Array = NDArray[np.float64]

# Coefficients are searched in coordinates of the whole line (see `Parameter.above`), inside this box: a lower
# bound is missed by 1e-6 at least, and nothing exceeds 1e20.
BOX_ABOVE = (-14.0, 46.0)
BOX_REAL = (-100.0, 100.0)


@dataclass(frozen=True)
class Parameter:
    """A coefficient of a law.

    Attributes:
        name: As the paper writes it.
        meaning: In a few words.
        start: Range that starting points are drawn from evenly; where there is a lower bound, range of the
            distance to it, drawn evenly in its logarithm.
        above: Lower bound: a number, the name of an earlier parameter, or None for any real number. The
            coordinate that is searched is then the logarithm of the distance to the bound.
    """

    name: str
    meaning: str
    start: tuple[float, float]
    above: float | str | None = 0.0

    @property
    def box(self) -> tuple[float, float]:
        """Least and greatest value of the coordinate that is searched."""
        return BOX_REAL if self.above is None else BOX_ABOVE


@dataclass(frozen=True)
class Preset:
    """Published coefficients of a law.

    Attributes:
        name: To ask for it.
        source: Paper, table.
        coefficients: By parameter name, as printed.
        ranges: Least and greatest value in the paper's runs, by standard column, inputs or not, where it is
            known.
        holds_for: What was fixed in those runs: data, architecture, how parameters are counted.
        caution: What else to know before relying on it.
    """

    name: str
    source: str
    coefficients: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    holds_for: str = ""
    caution: str = ""


class Law(ABC):
    """Loss as a function of a run's sizes. A subclass is found by being in a module of `moe.scaling_laws`.

    Attributes:
        name: What it is asked for by.
        source: Paper and equation.
        formula: One line, ASCII.
        inputs: Names of the columns it reads, with what they mean for this law where that is narrower than
            `moe.scaling_laws.columns.COLUMNS`.
        parameters: Its coefficients, in the order of every array of coefficients.
        presets: Published values.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    formula: ClassVar[str]
    inputs: ClassVar[Mapping[str, str]]
    parameters: ClassVar[tuple[Parameter, ...]]
    presets: ClassVar[tuple[Preset, ...]] = ()

    @abstractmethod
    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """Natural logarithm of the loss.

        Args:
            p: Coefficients by name, fp64: ``[S, 1]``, or ``[S, R]`` of their own for every run.
            x: Inputs by name, ``[R]`` fp64.

        Returns:
            ``[S, R]``.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    def preset(self, name: str) -> Preset:
        """Published values by name.

        Raises:
            KeyError: There are none of this name; the message lists those there are.
        """
        for preset in self.presets:
            if preset.name == name:
                return preset
        known = ", ".join(preset.name for preset in self.presets) or "none"
        raise KeyError(f"{self.name} has no preset {name!r}; there are: {known}")

    def vector(self, coefficients: Mapping[str, float]) -> Array:
        """Coefficients by name as ``[P]``."""
        return np.array([coefficients[name] for name in self.names], dtype=np.float64)

    def predict(self, coefficients: Mapping[str, float] | Array, columns: Mapping[str, object]) -> Array:
        """Losses of runs.

        Args:
            coefficients: By name; or ``[P]``, or ``[S, P]`` for several sets at once.
            columns: Numbers or arrays by input name, broadcast against each other; others are not looked at.

        Returns:
            The broadcast shape of the columns, after ``[S]`` if there are several sets.
        """
        values = self.vector(coefficients) if isinstance(coefficients, Mapping) else coefficients
        arrays = np.broadcast_arrays(*(np.asarray(columns[name], dtype=np.float64) for name in self.inputs))
        shape = arrays[0].shape
        x = {
            name: torch.from_numpy(array.ravel().copy())
            for name, array in zip(self.inputs, arrays, strict=True)
        }
        # Overflow to infinity is the answer far outside of a law's range.
        loss = self.log_loss(self.by_name(torch.from_numpy(np.atleast_2d(values))), x).exp().numpy()
        return np.asarray(loss.reshape(shape if values.ndim == 1 else (len(values), *shape)))

    def by_name(self, values_SP: Tensor) -> dict[str, Tensor]:
        """Coefficients ``[S, P]`` as `log_loss` takes them."""
        return {name: values_SP[:, i : i + 1] for i, name in enumerate(self.names)}

    def constrain(self, theta_SP: Tensor) -> Tensor:
        """Coefficients ``[S, P]`` of the coordinates that are searched, kept inside the box."""
        values: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            theta_S = theta_SP[:, i].clamp(*parameter.box)
            if parameter.above is None:
                values[parameter.name] = theta_S
            elif isinstance(parameter.above, str):
                values[parameter.name] = values[parameter.above] + theta_S.exp()
            else:
                values[parameter.name] = parameter.above + theta_S.exp()
        return torch.stack(list(values.values()), dim=1)

    def unconstrain(self, values_SP: Array) -> Array:
        """Inverse of `constrain`, of coefficients inside their domains."""
        theta_SP = np.array(values_SP, dtype=np.float64)
        for i, parameter in enumerate(self.parameters):
            if parameter.above is None:
                continue
            bound = parameter.above
            floor = values_SP[:, self.names.index(bound)] if isinstance(bound, str) else bound
            theta_SP[:, i] = np.log(values_SP[:, i] - floor)
        return theta_SP

    def box(self) -> tuple[Array, Array]:
        """Least and greatest coordinates ``[P]``."""
        lows, highs = zip(*(parameter.box for parameter in self.parameters), strict=True)
        return np.array(lows), np.array(highs)

    def start_box(self) -> tuple[Array, Array]:
        """Coordinates ``[P]`` between which starting points lie."""
        ends = [
            parameter.start if parameter.above is None else tuple(np.log(np.array(parameter.start)))
            for parameter in self.parameters
        ]
        lows, highs = zip(*ends, strict=True)
        return np.array(lows), np.array(highs)


def log_sum(terms: Sequence[Tensor]) -> Tensor:
    """Logarithm of a sum of terms given by their logarithms, without overflow."""
    shape = torch.broadcast_shapes(*(term.shape for term in terms))  # type: ignore[no-untyped-call]
    return torch.logsumexp(torch.stack([term.expand(shape) for term in terms]), dim=0)


def effective_experts(experts: Tensor, start: Tensor, most: Tensor) -> Tensor:
    """The saturating count of experts of Clark et al.: ``start`` at one expert, at most ``most``.

    ``1 / Ehat = 1 / (E - 1 + 1 / (1/start - 1/most)) + 1 / most`` (arXiv 2202.01169; 2502.05172, eq. 5).
    """
    gap = start * most / (most - start)
    shifted = experts - 1 + gap
    return shifted * most / (shifted + most)


def outside(ranges: Mapping[str, tuple[float, float]], columns: Mapping[str, object]) -> list[str]:
    """Says which inputs lie outside of the range that a law was fitted on, one sentence each."""
    found = []
    for name, (low, high) in ranges.items():
        if name not in columns:
            continue
        values = np.atleast_1d(np.asarray(columns[name], dtype=np.float64))
        # What is printed is rounded: half a per cent is no extrapolation.
        if values.min() < low * 0.995 or values.max() > high * 1.005:
            least, most = values.min(), values.max()
            given = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
            fitted = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            found.append(f"{name} {given} is outside of the {fitted} that the law was fitted on")
    return found


def check_law(law: Law) -> list[str]:
    """What is wrong with the declarations of a law; nothing for those of this package (a test sees to it)."""
    wrong = [f"input {name} is no standard column" for name in law.inputs if name not in COLUMNS]
    for preset in law.presets:
        wrong += _differences(f"preset {preset.name}", preset.coefficients, law.names)
        unknown = sorted(set(preset.ranges) - set(COLUMNS))
        wrong += [f"preset {preset.name} has a range of {name}, which is no column" for name in unknown]
    return wrong


def _differences(what: str, given: Iterable[str], wanted: Iterable[str]) -> list[str]:
    given, wanted = set(given), set(wanted)
    wrong = [f"{what} lacks {name}" for name in sorted(wanted - given)]
    return wrong + [f"{what} has an unknown {name}" for name in sorted(given - wanted)]
