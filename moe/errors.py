"""Errors for users: each names the option, its value, the rule it breaks and the remedy.

This is the leaf module of the project: it imports nothing of ours, and everything may import it.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

# Characters of a value that a sentence shows; of a longer one it shows both ends.
_LONGEST = 600


@dataclass(frozen=True)
class Mistake:
    """A value that breaks a rule.

    Attributes:
        path: Config path (``router.top_k``), flag (``--dense``) or file.
        value: The value given there.
        rule: The broken rule, without a full stop.
        remedy: The correction, as a sentence.
    """

    path: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > _LONGEST:
            shown = f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 4 :]} ({len(shown):,} characters)"
        return f"{self.path}={shown}: {self.rule}. {self.remedy}"

    def __hash__(self) -> int:
        """Hashes without the value, which may be a list of a user's file."""
        return hash((self.path, self.rule))

    def under(self, section: str) -> Mistake:
        """Prefixes the path, e.g. ``top_k`` with ``router``; an empty section leaves it as it is."""
        return replace(self, path=".".join(filter(None, (section, self.path))))


class GraftError(Exception):
    """Base of every error that Graft raises on purpose. ``exit_code`` is the exit code of the command."""

    exit_code = 1


class UserError(GraftError):
    """Error in the input of a user. Carries every mistake found, not only the first."""

    exit_code = 2

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        assert mistakes, "a UserError needs at least one mistake"
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(str(m) for m in self.mistakes))

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Mistake, ...]]]:
        """Errors travel from rank 0 to the others: pickled by their mistakes, not by their text."""
        return type(self), (self.mistakes,)

    @classmethod
    def one(cls, path: str, value: Any, rule: str, remedy: str) -> Self:
        """Builds the error of a single mistake."""
        return cls([Mistake(path, value, rule, remedy)])


class ConfigError(UserError):
    """The configuration breaks a rule."""


class FieldError(ConfigError, ValueError):
    """Error of a config class whose fields break its rules. Paths are relative to the class.

    It is a ValueError as well, so that pydantic collects it with the mistakes of the other sections.
    """

    def under(self, section: str) -> ConfigError:
        """Returns the same mistakes with the section before their paths."""
        return ConfigError([mistake.under(section) for mistake in self.mistakes])


#: Integers of torch and of files have 64 bits.
_LARGEST = 2**63 - 1

#: Does it hold, name of the field, rule, remedy.
Rule = tuple[bool, str, str, str]


def require(config: object, *rules: Rule) -> None:
    """Checks the fields of a config.

    Args:
        config: The object that has the fields.
        rules: Its rules.

    Raises:
        FieldError: Rules are broken; it carries all of them.
    """
    broken = [
        Mistake(name, getattr(config, name), rule, remedy) for holds, name, rule, remedy in rules if not holds
    ]
    if broken:
        raise FieldError(broken)


def require_numbers(config: Any) -> None:
    """Checks every number in the fields of a config dataclass, also inside lists and mappings.

    Raises:
        FieldError: Numbers are infinite, not a number, or beyond 64 bits; it carries all of them.
    """
    found = []
    for field in fields(config):
        for value in _numbers(getattr(config, field.name)):
            if isinstance(value, float) and not math.isfinite(value):
                found.append(Mistake(field.name, value, "the number is not finite", "Set a finite one."))
            elif abs(value) > _LARGEST:
                rule = "the integer does not fit into 64 bits"
                if isinstance(value, float):
                    rule = "the number is larger than any of its kind"
                found.append(Mistake(field.name, value, rule, f"Set it to {_LARGEST} or less in size."))
    if found:
        raise FieldError(found)


def _numbers(value: Any) -> Iterator[float | int]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_numbers, value))
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))


def at_least(config: object, low: int, *names: str) -> list[Rule]:
    """Returns the rules that fields are no smaller than a number."""
    return [(getattr(config, name) >= low, name, f"must be at least {low}", "Raise it.") for name in names]


def not_negative(config: object, *names: str) -> list[Rule]:
    """Returns the rules that coefficients are not negative."""
    rule, remedy = "a coefficient is not negative", "Set it to 0 or more."
    return [(getattr(config, name) >= 0, name, rule, remedy) for name in names]


class DataError(UserError):
    """Training data cannot be read or does not fit."""


class ModelError(UserError):
    """The dense checkpoint cannot be loaded, or cannot become an MoE model."""


class CheckpointError(UserError):
    """A training checkpoint is damaged, incomplete or of another run."""


class DiskError(UserError):
    """Something could not be written: no space left, or no permission."""


class ExactnessError(GraftError):
    """A conversion that claims to keep the function does not; the message names the layer."""


def choose(value: object, names: Iterable[str]) -> str:
    """Returns the remedy for a name that does not exist: the nearest that does, and all of them."""
    known = sorted(names)
    near = difflib.get_close_matches(str(value), known, n=1)
    opening = f"Did you mean {near[0]}? There are" if near else "Choose one of"
    return f"{opening}: {', '.join(known) or 'none'}."
