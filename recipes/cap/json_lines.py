"""Reads a user's file of JSON lines, and reports every mistake with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moe.errors import Mistake
from recipes.runtime.user_json import UserJsonError, read_json_text

RowT = TypeVar("RowT")


def read_json_lines(
    path: Path, where: str, parse: Callable[[dict[str, Any]], RowT | str], noun: str, remedy: str
) -> tuple[list[RowT], list[Mistake]]:
    """Returns the rows of a file and every mistake in it; empty lines are skipped.

    Args:
        path: The file.
        where: The option that names it.
        parse: Turns a line's object into a row, or into the rule that it breaks.
        noun: Name of a row.
        remedy: Correct form of a line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [Mistake(where, str(path), f"it cannot be read ({error})", "Give a file of JSON lines.")]
    rows: list[RowT] = []
    mistakes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _row(line, parse)
        if isinstance(found, str):
            mistakes.append(Mistake(f"{where} {path}:{number}", line[:80], found, remedy))
        else:
            rows.append(found)
    if not rows and not mistakes:
        mistakes.append(Mistake(where, str(path), f"it holds no {noun}", "Give at least one line."))
    return rows, mistakes


def _row(line: str, parse: Callable[[dict[str, Any]], RowT | str]) -> RowT | str:
    try:
        value = read_json_text(line, "")
    except UserJsonError as error:
        return f"it {error.clause}"
    return parse(value) if isinstance(value, dict) else "it is not an object, {...}"
