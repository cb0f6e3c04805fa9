"""Choice of the layers of a model that become MoE layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORMS = "Use all, every:N, every:N:OFFSET, last:N, inner:N, or a list of layer indices such as [0,2,5]."


@dataclass(frozen=True)
class LayerChoice:
    """Rule that picks layers from any number of them.

    Attributes:
        every: Picks each ``every``-th layer.
        offset: The first of them.
        last: Number of last layers to pick from; None for all.
        ends: Number of layers left out at either end.
        listed: Picks exactly these; None if the other fields rule.
    """

    every: int = 1
    offset: int = 0
    last: int | None = None
    ends: int = 0
    listed: tuple[int, ...] | None = None

    def pick(self, num_layers: int) -> list[int]:
        """Returns the chosen indices, ascending.

        Raises:
            ValueError: A listed layer does not exist, more layers are asked for than exist, or none is left.
        """
        if self.listed is not None:
            outside = [i for i in self.listed if not 0 <= i < num_layers]
            if outside:
                raise ValueError(
                    f"layers {outside} do not exist, the model has layers 0 to {num_layers - 1}. {_FORMS}"
                )
            return sorted(self.listed)
        if self.last is not None and self.last > num_layers:
            raise ValueError(f"last:{self.last} asks for more than the model's {num_layers} layers. {_FORMS}")
        first = 0 if self.last is None else num_layers - self.last
        picked = list(range(first + self.offset + self.ends, num_layers - self.ends, self.every))
        if not picked:
            raise ValueError(f"no layer is left of the model's {num_layers}. {_FORMS}")
        return picked


def parse_layers(layers: str | list[int]) -> LayerChoice:
    """Reads the config value ``upcycle.layers``.

    Raises:
        ValueError: The value has none of the forms; the message lists them.
    """
    if not isinstance(layers, str):
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers={layers}: the list is empty or names a layer twice. {_FORMS}")
        return LayerChoice(listed=tuple(layers))
    if layers == "all":
        return LayerChoice()
    if match := re.fullmatch(r"every:([1-9]\d*)(?::(\d+))?", layers):
        return LayerChoice(every=int(match[1]), offset=int(match[2] or 0))
    if match := re.fullmatch(r"last:([1-9]\d*)", layers):
        return LayerChoice(last=int(match[1]))
    if match := re.fullmatch(r"inner:([1-9]\d*)", layers):
        return LayerChoice(ends=int(match[1]))
    raise ValueError(f"layers={layers!r} is none of the known forms. {_FORMS}")
