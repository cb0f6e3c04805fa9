"""Reads conversations: JSON lines of messages, and what else a row says of them.

Every field of a message, and every field of a row that changes what is said or learned, is honoured or
refused. Other fields of a row (ids, sources) are listed, so that it is told that they are not read. A field
that repeats a message, as ``prompt`` often does, says nothing of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from moe.errors import DataError
from recipes.data.documents import read_json_records
from recipes.runtime.user_json import UserJsonError, read_json_text

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
# Roles that mean the assistant under a name that no loss would count.
_MISNAMED = frozenset((ASSISTANT, "gpt", "chatgpt", "bot", "chatbot", "model", "ai"))
_WEIGHTS = ("weight", "train", "loss_mask", "trainable", "loss")
_SYSTEM = ("system", "system_prompt")
# Words in the name of a row's field that changes what is said or learned, and cannot be honoured.
_SAYS = frozenset(
    (
        *("system", "sys", "developer", "persona", "preamble", "instruction", "instructions", "prompt"),
        *("context", "response", "completion", "tool", "tools", "function", "functions", "document"),
        *("documents", "image", "images", "video", "videos", "audio", "audios", "media", "reasoning"),
        *("thinking", "thought", "thoughts", "rationale", "cot", "kwargs"),
    )
)
_LEARNS = frozenset(("weight", "weights", "mask", "masks", "loss", "train", "trainable"))
# Words of fields that say something about the row: of which prompt, of how many tools.
_ABOUT = frozenset(["id", "ids", "hash", "type", "source", "version", "fingerprint", "count"])
_LEAVE = "Remove the field, or list it in data.ignored_fields to train without it."
_CALL_REMEDY = (
    'Write calls as {"tool_calls": [{"function": {"name": "...", "arguments": {...}}}]}, '
    "or leave the row out."
)


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        messages: Each with ``role``, ``content``, and what else it says for the chat template to write;
            arguments of ``tool_calls`` are objects, as templates take them.
        place: File and line.
        consumed: Bytes read since the previous conversation.
        tools: Tools that the assistant may call, for the chat template to write.
        uncounted: Indices of messages that the row takes out of the loss.
        unread: Fields of the row that are not read.
    """

    messages: list[dict[str, Any]]
    place: str
    consumed: int
    tools: list[dict[str, Any]] | None = None
    uncounted: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()


def read_conversations(path: Path, ignored: Collection[str] = ()) -> Iterator[Conversation]:
    """Yields the conversations of a JSON file, one per line or in one array.

    Args:
        path: The file.
        ignored: Fields of rows and messages that are treated as if they were not there.

    Raises:
        DataError: A row is no conversation, or says what cannot be honoured; names file, line and field.
    """
    for record in read_json_records(path):
        yield _conversation(record.value, record.place, record.consumed, ignored)


def peek_conversation(path: Path, ignored: Collection[str] = ()) -> None:
    """Reads the first conversation, to find a mistake early.

    Raises:
        DataError: See `read_conversations`.
    """
    next(read_conversations(path, ignored), None)


def _conversation(row: Any, place: str, consumed: int, ignored: Collection[str]) -> Conversation:
    if not isinstance(row, dict):
        _fail(place, f"is a JSON {type(row).__name__}, not an object")
    keys = [name for name in ("messages", "conversations") if name in row]
    if len(keys) != 1:
        rule = "has both 'messages' and 'conversations'" if keys else "has no 'messages'"
        _fail(place, f"{rule}; it has {', '.join(map(repr, row)) or 'no fields'}")
    said = _said(row, ignored)
    entries = said.pop(keys[0], None)
    if row[keys[0]] == []:
        _fail(place, f"has no message under {keys[0]!r}")
    if not isinstance(entries, list):
        _fail(place, f"has a {type(entries).__name__} under {keys[0]!r}, not a list of messages")
    read = [_message(entry, f"message {i}", place, ignored) for i, entry in enumerate(entries, start=1)]
    messages, uncounted = [message for message, _ in read], {i for i, (_, on) in enumerate(read) if not on}
    prompt = _system_prompt(said, messages, place)
    if prompt:
        messages, uncounted = [prompt, *messages], {i + 1 for i in uncounted}
    tools = _tools(said.pop("tools", None), place)
    if not _counts(said, "the row", place):
        uncounted = set(range(len(messages)))
    for name, value in said.items():
        if _changes(name, value, messages):
            _fail(place, f"has the field {name!r}, which is not read", _LEAVE)
    return Conversation(messages, place, consumed, tools, frozenset(uncounted), tuple(said))


def _changes(name: str, value: Any, messages: list[dict[str, Any]]) -> bool:
    """Returns whether a field of a row changes what is said or learned, by its name; a copy does not."""
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    if words & _ABOUT:
        return False
    if words & _LEARNS or not words & _SAYS:
        return bool(words & _LEARNS)
    if isinstance(value, int | float):  # how many there are, or whether there are any
        return "enable" in words
    return not (isinstance(value, str) and any(value.strip() in said["content"] for said in messages))


def _said(fields: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Returns the fields that say something: neither empty nor ignored."""
    return {
        name: value
        for name, value in fields.items()
        if name not in ignored and not (value is None or value in ("", [], {}))
    }


def _message(entry: Any, which: str, place: str, ignored: Collection[str]) -> tuple[dict[str, Any], bool]:
    """Returns a message, and whether the row leaves it in the loss."""
    if not isinstance(entry, dict):
        _fail(place, f"has a {type(entry).__name__} as {which}, not an object")
    names = ("role", "content") if "role" in entry or "from" not in entry else ("from", "value")
    role, content = (entry.get(name) for name in names)
    if names[0] == "from":
        role = _SPEAKERS.get(str(role).lower())
        if role is None:
            _fail(place, f"has {entry['from']!r} as the speaker of {which}, not one of {sorted(_SPEAKERS)}")
    more = {name: value for name, value in _said(entry, ignored).items() if name not in names}
    if "function_call" in more:
        _fail(place, f"calls a tool in {which} by the field 'function_call', which is not read", _CALL_REMEDY)
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], which, place)
        content = "" if content is None else content
    if isinstance(content, list):
        content = _joined(content, which, place)
    if not isinstance(role, str) or not isinstance(content, str):
        kinds = f"{type(role).__name__} and {type(content).__name__}"
        _fail(place, f"has {kinds} as role and content of {which}, not two texts")
    if role != ASSISTANT and role.strip().lower() in _MISNAMED:
        _fail(place, f"has the role {role!r} in {which}", f"Name the role {ASSISTANT!r}.")
    on = _counts(more, which, place, may_ask=role == ASSISTANT)
    message = {"role": role, "content": content, **more}
    _check_encodable(message, which, place)
    return message, on


def _calls(value: Any, which: str, place: str) -> list[dict[str, Any]]:
    """Returns the calls of a message; arguments that are JSON, as OpenAI has them, become objects."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            _fail(place, f"has under 'tool_calls' of {which} what names no function", _CALL_REMEDY)
        given = inner.get("arguments")
        if isinstance(given, str):
            try:
                given = read_json_text(given or "{}", place)
            except UserJsonError as error:
                _fail(
                    place,
                    f"has arguments in 'tool_calls' of {which}, a text that {error.clause}",
                    _CALL_REMEDY,
                )
        if not isinstance(given, dict | None):
            kind = type(given).__name__
            _fail(place, f"has a {kind} as arguments in 'tool_calls' of {which}, not an object", _CALL_REMEDY)
        inner = inner | {"arguments": given or {}}
        calls.append(call | {"function": inner} if "function" in call else inner)
    return calls


def _joined(parts: list[Any], which: str, place: str) -> str:
    """Joins the parts of a content that is a list, as chat templates do; all must be text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            _fail(place, f"has a part of type {kind!r} in {which}, and only text is read")
        more = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
        if more:
            _fail(place, f"has the field {more[0]!r} in a part of {which}, which is not read")
        texts.append(part["text"])
    return "".join(texts)


def _counts(fields: dict[str, Any], which: str, place: str, may_ask: bool = True) -> bool:
    """Takes out the fields that say whether something counts for the loss; returns what they say."""
    on = True
    for name in _WEIGHTS:
        if name not in fields:
            continue
        value = fields.pop(name)
        if value not in (0, 1) or not isinstance(value, int | float):
            _fail(place, f"has {name}={value!r} in {which}; only 0, 1, true and false are read", _LEAVE)
        if value and not may_ask:
            _fail(place, f"has {name}={value!r} in {which}, and only the assistant's can be learned", _LEAVE)
        on = on and bool(value)
    return on


def _system_prompt(said: dict[str, Any], messages: list[dict[str, Any]], place: str) -> dict[str, Any] | None:
    """Takes a system prompt that is a field of the row; returns it as a message."""
    found = [(name, said.pop(name)) for name in _SYSTEM if name in said]
    if not found:
        return None
    name, text = found[0]
    if not isinstance(text, str):
        _fail(place, f"has a {type(text).__name__} under {name!r}, not a text")
    if len(found) > 1 or any(message["role"] == "system" for message in messages):
        _fail(place, f"has several system prompts, one of them under {name!r}", "Keep one of them.")
    message = {"role": "system", "content": text}
    _check_encodable(message, repr(name), place)
    return message


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Checks the tools of a row: a list of objects, or its JSON."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = read_json_text(value, place)
        except UserJsonError as error:
            _fail(place, f"has a text under 'tools' that {error.clause}", _LEAVE)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        _fail(place, "has no list of objects under 'tools'", _LEAVE)
    _check_encodable(value, "'tools'", place)
    return value or None


def _check_encodable(value: Any, which: str, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        rule = f"has half a surrogate pair in {which}, which cannot be encoded"
        _fail(place, rule, "Correct the \\u escape, or leave the row out.")
    except RecursionError:
        _fail(place, f"nests lists and objects too deeply in {which}", "Leave the row out.")


def _fail(
    place: str,
    rule: str,
    remedy: str = 'Write rows as {"messages": [{"role": "user", "content": "..."}, ...]}.',
) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
