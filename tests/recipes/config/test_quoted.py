"""Any text survives as an override once it is quoted."""

from __future__ import annotations

from recipes.config.compose import compose_config, quoted
from tests.grid import each

_PATHS = [
    "lang=en/part.txt",
    "notes (1).txt",
    "a,b.txt",
    "100%.txt",
    "{x}.txt",
    "$HOME/x",
    "${x}",
    "a${b.c}d",
]
_PATHS += [
    "it's",
    'say "hi"',
    "back\\slash",
    "end\\",
    '\\"q',
    "\\${x}",
    "\\\\${x}",
    "[1]",
    "null",
    "12",
    "1e5",
]
_PATHS += [" lead", "trail ", "", "a:b", "#x", "~x", "!x", "é", '"', '\\\\"']


@each("text", _PATHS)
def test_a_quoted_path_is_taken_as_it_stands(text: str) -> None:
    values = compose_config(["+recipe=upcycle", f"data.path={quoted(text)}"])
    assert values["data"]["path"] == text
