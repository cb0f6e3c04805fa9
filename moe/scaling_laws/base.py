"""Contract of the scaling laws: inputs, coefficients with domains, a stable log-loss, published values.

Letters: R runs, P parameters of a law (its coefficients), S sets of coefficients.
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

# Coefficients are searched in unbounded coordinates (see `Parameter.above`) inside this box: they stay at
# least 1e-6 above a lower bound, and below 1e20.
BOX_ABOVE = (-14.0, 46.0)
BOX_REAL = (-100.0, 100.0)


@dataclass(frozen=True)
class Parameter:
    """Coefficient of a law.

    Attributes:
        name: Its symbol in the paper.
        meaning: Its meaning in a few words.
        start: Range of the uniform starting points; with a lower bound, the range of the distance to it,
            drawn uniformly in its logarithm.
        above: Lower bound: a number, the name of an earlier parameter, or None for any real number. With a
            bound, the searched coordinate is the logarithm of the distance to it.
    """

    name: str
    meaning: str
    start: tuple[float, float]
    above: float | str | None = 0.0

    @property
    def box(self) -> tuple[float, float]:
        """Smallest and largest value of the searched coordinate."""
        return BOX_REAL if self.above is None else BOX_ABOVE


@dataclass(frozen=True)
class Preset:
    """Published coefficients of a law.

    Attributes:
        name: Name of the preset.
        source: Paper and table.
        coefficients: Values by parameter name, as printed.
        ranges: Smallest and largest value in the paper's runs, by standard column (inputs or not), if known.
        holds_for: Settings of those runs: data, architecture, the way of counting parameters.
        caution: Further caveats.
    """

    name: str
    source: str
    coefficients: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    holds_for: str = ""
    caution: str = ""


class Law(ABC):
    """Loss as a function of a run's sizes. Subclasses are found in any module of `moe.scaling_laws`.

    Attributes:
        name: Name of the law.
        source: Paper and equation.
        formula: The formula in one line of ASCII.
        inputs: Names of the columns that it reads, with their meaning for this law where it is narrower than
            in `moe.scaling_laws.columns.COLUMNS`.
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
        """Computes the natural logarithm of the loss.

        Args:
            p: Coefficients by name, fp64: ``[S, 1]``, or ``[S, R]`` with separate ones for every run.
            x: Inputs by name, ``[R]`` fp64.

        Returns:
            ``[S, R]``.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    def preset(self, name: str) -> Preset:
        """Returns published values by name.

        Raises:
            KeyError: No preset has this name; the message lists the known ones.
        """
        for preset in self.presets:
            if preset.name == name:
                return preset
        known = ", ".join(preset.name for preset in self.presets) or "none"
        raise KeyError(f"{self.name} has no preset {name!r}; there are: {known}")

    def vector(self, coefficients: Mapping[str, float]) -> Array:
        """Returns coefficients by name as ``[P]``."""
        return np.array([coefficients[name] for name in self.names], dtype=np.float64)

    def predict(self, coefficients: Mapping[str, float] | Array, columns: Mapping[str, object]) -> Array:
        """Predicts the losses of runs.

        Args:
            coefficients: Values by name; or ``[P]``, or ``[S, P]`` for several sets at once.
            columns: Numbers or arrays by input name, broadcast against each other; others are ignored.

        Returns:
            Losses in the broadcast shape of the columns, preceded by ``[S]`` for several sets.
        """
        values = self.vector(coefficients) if isinstance(coefficients, Mapping) else coefficients
        arrays = np.broadcast_arrays(*(np.asarray(columns[name], dtype=np.float64) for name in self.inputs))
        shape = arrays[0].shape
        x = {
            name: torch.from_numpy(array.ravel().copy())
            for name, array in zip(self.inputs, arrays, strict=True)
        }
        # Far outside of a law's range, overflow to infinity is the right answer.
        loss = self.log_loss(self.by_name(torch.from_numpy(np.atleast_2d(values))), x).exp().numpy()
        return np.asarray(loss.reshape(shape if values.ndim == 1 else (len(values), *shape)))

    def by_name(self, values_SP: Tensor) -> dict[str, Tensor]:
        """Converts coefficients ``[S, P]`` to the form that `log_loss` takes."""
        return {name: values_SP[:, i : i + 1] for i, name in enumerate(self.names)}

    def constrain(self, theta_SP: Tensor) -> Tensor:
        """Converts searched coordinates, clamped to the box, to coefficients ``[S, P]``."""
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
        """Inverts `constrain`, for coefficients inside their domains."""
        theta_SP = np.array(values_SP, dtype=np.float64)
        for i, parameter in enumerate(self.parameters):
            if parameter.above is None:
                continue
            bound = parameter.above
            floor = values_SP[:, self.names.index(bound)] if isinstance(bound, str) else bound
            theta_SP[:, i] = np.log(values_SP[:, i] - floor)
        return theta_SP

    def box(self) -> tuple[Array, Array]:
        """Returns the smallest and largest coordinates ``[P]``."""
        lows, highs = zip(*(parameter.box for parameter in self.parameters), strict=True)
        return np.array(lows), np.array(highs)

    def start_box(self) -> tuple[Array, Array]:
        """Returns the coordinates ``[P]`` between which starting points lie."""
        ends = [
            parameter.start if parameter.above is None else tuple(np.log(np.array(parameter.start)))
            for parameter in self.parameters
        ]
        lows, highs = zip(*ends, strict=True)
        return np.array(lows), np.array(highs)


def log_sum(terms: Sequence[Tensor]) -> Tensor:
    """Computes the logarithm of a sum of terms given by their logarithms, without overflow."""
    shape = torch.broadcast_shapes(*(term.shape for term in terms))  # type: ignore[no-untyped-call]
    return torch.logsumexp(torch.stack([term.expand(shape) for term in terms]), dim=0)


def effective_experts(experts: Tensor, start: Tensor, most: Tensor) -> Tensor:
    """Computes the saturating count of experts of Clark et al.: ``start`` at one expert, at most ``most``.

    ``1 / Ehat = 1 / (E - 1 + 1 / (1/start - 1/most)) + 1 / most`` (arXiv 2202.01169; 2502.05172, eq. 5).
    """
    gap = start * most / (most - start)
    shifted = experts - 1 + gap
    return shifted * most / (shifted + most)


def outside(ranges: Mapping[str, tuple[float, float]], columns: Mapping[str, object]) -> list[str]:
    """Lists the inputs outside of the range that a law was fitted on, one sentence each."""
    found = []
    for name, (low, high) in ranges.items():
        if name not in columns:
            continue
        values = np.atleast_1d(np.asarray(columns[name], dtype=np.float64))
        # Printed ranges are rounded: half a per cent is no extrapolation.
        if values.min() < low * 0.995 or values.max() > high * 1.005:
            least, most = values.min(), values.max()
            given = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
            fitted = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            found.append(f"{name} {given} is outside of the {fitted} that the law was fitted on")
    return found


def check_law(law: Law) -> list[str]:
    """Lists mistakes in the declarations of a law; a test requires none for the laws of this package."""
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
