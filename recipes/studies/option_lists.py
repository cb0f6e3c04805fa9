"""Lists of choices with options on the command line, as ``copy,drop[ratio=0.25]``."""

from __future__ import annotations

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
