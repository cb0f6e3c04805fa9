"""Sections of the config that single jobs and methods read, found by being in a module of this package.

A job or method that needs options of its own adds a module here and ``conf/section/NAME.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.registry import discover
from moe.types import Config


@dataclass(frozen=True)
class Section(Config):
    """Section of the config; ``RunConfig.section(CLASS)`` gives that of a run.

    Attributes:
        name: The section's key.
    """

    name: ClassVar[str]


def section_classes() -> dict[str, type[Section]]:
    """Returns every section's class by its name."""
    return discover(__name__, Section)
