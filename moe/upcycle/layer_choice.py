"""Which layers of a host become mixtures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moe.errors import FieldError

_FORMS = "Use all, every:N, every:N:OFFSET, last:N, inner:N, or a list of layer indices such as [0,2,5]."


@dataclass(frozen=True)
class LayerChoice:
    """A rule that picks layers, whatever their number.

    Attributes:
        every: Take each ``every``-th layer.
        offset: The first of them.
        last: Take only the last so many layers; None for no such limit.
        ends: Leave so many layers out at either end.
        listed: Take exactly these; None when the other fields rule.
        given: The option's value, for errors.
    """

    every: int = 1
    offset: int = 0
    last: int | None = None
    ends: int = 0
    listed: tuple[int, ...] | None = None
    given: str | list[int] = field(default="all", compare=False)

    def pick(self, num_layers: int) -> list[int]:
        """The chosen indices, ascending.

        Raises:
            FieldError: A listed layer does not exist, more layers are asked for than there are, or
                none is left.
        """
        if self.listed is not None:
            outside = [i for i in self.listed if not 0 <= i < num_layers]
            if outside:
                rule = f"layers {outside} do not exist, the model has layers 0 to {num_layers - 1}"
                raise self._error(rule)
            return sorted(self.listed)
        if self.last is not None and self.last > num_layers:
            raise self._error(f"last:{self.last} asks for more than the model's {num_layers} layers")
        first = 0 if self.last is None else num_layers - self.last
        picked = list(range(first + self.offset + self.ends, num_layers - self.ends, self.every))
        if not picked:
            raise self._error(f"no layer is left of the model's {num_layers}")
        return picked

    def _error(self, rule: str) -> FieldError:
        return FieldError.one("layers", self.given, rule, _FORMS)


def parse_layers(layers: str | list[int]) -> LayerChoice:
    """Reads the config value ``upcycle.layers``.

    Raises:
        FieldError: It has none of the forms; the message lists them.
    """
    if not isinstance(layers, str):
        if not layers or len(set(layers)) != len(layers):
            raise FieldError.one("layers", layers, "the list is empty or names a layer twice", _FORMS)
        return LayerChoice(listed=tuple(layers), given=layers)
    if layers == "all":
        return LayerChoice()
    if match := re.fullmatch(r"every:([1-9]\d*)(?::(\d+))?", layers):
        return LayerChoice(every=int(match[1]), offset=int(match[2] or 0), given=layers)
    if match := re.fullmatch(r"last:([1-9]\d*)", layers):
        return LayerChoice(last=int(match[1]), given=layers)
    if match := re.fullmatch(r"inner:([1-9]\d*)", layers):
        return LayerChoice(ends=int(match[1]), given=layers)
    raise FieldError.one("layers", layers, "is none of the known forms", _FORMS)
