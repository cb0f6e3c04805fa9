"""Lists of choices with options, as ``copy,drop[ratio=0.25]``, and the command line of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.config.compose import quoted
from recipes.config.search_path import choices_of


def conf_choices(group: str) -> list[str]:
    """Returns every choice of a folder of ``conf``."""
    return list(choices_of(group))


def split_list(text: str) -> list[str]:
    """Splits at the commas outside of brackets; empty parts are dropped."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def trial_options(recipe: str, given: Sequence[str], own: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Returns the command line of one run of a study; data, their order and validation set keep seed 0.

    Args:
        recipe: Its recipe.
        given: Options of the user.
        own: Options that distinguish the run from the others; they come later, so that they win.
        folder: Its run directory.
    """
    place = [f"output_dir={quoted(str(folder.parent))}", f"run.name={quoted(folder.name)}"]
    return (f"+recipe={recipe}", *given, *own, "data.seed=0", "tracker.mode=disabled", *place, "resume=auto")
