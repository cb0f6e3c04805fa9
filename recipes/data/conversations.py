"""Reads conversations: JSON lines of messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from moe.errors import DataError
from recipes.data.documents import read_json_records

ASSISTANT = "assistant"

# Names of the other common form, {"conversations": [{"from": ..., "value": ...}]}.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    ASSISTANT: ASSISTANT,
    "system": "system",
}


class Conversation(NamedTuple):
    """Messages with ``role`` and ``content``, their place, and bytes read since the previous conversation."""

    messages: list[dict[str, str]]
    place: str
    consumed: int


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yields the conversations of a JSON file, one per line or in one array.

    Raises:
        DataError: A row is no conversation; the message names file and line.
    """
    for record in read_json_records(path):
        yield Conversation(_messages(record.value, record.place), record.place, record.consumed)


def peek_conversation(path: Path) -> None:
    """Reads the first conversation, to find a mistake early.

    Raises:
        DataError: See `read_conversations`.
    """
    next(read_conversations(path), None)


def _messages(row: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        _fail(place, f"is a JSON {type(row).__name__}, not an object")
    key = next((name for name in ("messages", "conversations") if name in row), None)
    if key is None:
        _fail(place, f"has no 'messages'; it has {', '.join(map(repr, row)) or 'no fields'}")
    if not isinstance(row[key], list):
        _fail(place, f"has a {type(row[key]).__name__} under {key!r}, not a list of messages")
    return [_message(entry, f"message {number}", place) for number, entry in enumerate(row[key], start=1)]


def _message(entry: Any, which: str, place: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        _fail(place, f"has a {type(entry).__name__} as {which}, not an object")
    role, content = entry.get("role"), entry.get("content")
    if "role" not in entry and "from" in entry:
        role, content = _SPEAKERS.get(str(entry["from"]).lower()), entry.get("value")
        if role is None:
            _fail(place, f"has {entry['from']!r} as the speaker of {which}, not one of {sorted(_SPEAKERS)}")
    if entry.get("tool_calls"):
        _fail(place, f"calls a tool in {which}, which is not read", "Leave conversations with tools out.")
    if not isinstance(role, str) or not isinstance(content, str):
        kinds = f"{type(role).__name__} and {type(content).__name__}"
        _fail(place, f"has {kinds} as role and content of {which}, not two texts")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        rule = f"has half a surrogate pair in {which}, at character {error.start}, which cannot be encoded"
        _fail(place, rule, "Correct the \\u escape, or leave the row out.")
    return {"role": role, "content": content}


def _fail(
    place: str,
    rule: str,
    remedy: str = 'Write rows as {"messages": [{"role": "user", "content": "..."}, ...]}.',
) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
