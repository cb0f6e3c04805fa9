"""Errors that people read: what was given, which rule it broke, and what to do about it.

This is the leaf module of the project: it imports nothing of ours, and everything may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Mistake:
    """One thing a user got wrong.

    Attributes:
        path: Where it stands: a config path (``router.top_k``), a flag (``--dense``) or a file.
        value: What was given there.
        rule: The rule that it breaks, without a full stop.
        remedy: What to do instead, as a sentence.
    """

    path: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}={self.value!r}: {self.rule}. {self.remedy}"


class GraftError(Exception):
    """Base of every error that Graft raises on purpose. ``exit_code`` is what a command exits with."""

    exit_code = 1


class UserError(GraftError):
    """Something the user gave cannot be used. Carries every mistake found, not only the first."""

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


class DataError(UserError):
    """Training data cannot be read or does not fit."""


class ModelError(UserError):
    """The dense checkpoint cannot be loaded, or cannot hold a mixture of experts."""


class CheckpointError(UserError):
    """A training checkpoint is damaged, incomplete or of another run."""


class DiskError(UserError):
    """Something could not be written: no space left, or no permission."""


class ExactnessError(GraftError):
    """A conversion that claims to keep the function does not; the message names the layer."""
