"""Prints a pin of the lower end of every range of ``pyproject.toml``, for ``make lowest``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def ranges() -> dict[str, list[str]]:
    """Returns the ends of each requirement, those of extras as well: two, or one of what is pinned."""
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    found = {}
    for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        name, rest = re.fullmatch(r"([\w.-]+)(.*)", line).groups()  # type: ignore[union-attr]
        ends = re.fullmatch(r">=([^,]+),<=([^,]+)|==([^,]+)", rest)
        assert ends is not None, f"{line}: write NAME>=LOWEST,<=HIGHEST, both tested"
        found[name] = [end for end in ends.groups() if end is not None]
    return found


if __name__ == "__main__":
    print(*(f"{name}=={ends[0]}" for name, ends in ranges().items()))
