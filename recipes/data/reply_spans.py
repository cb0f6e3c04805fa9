"""Locates the assistant's replies in a rendered conversation, and checks that all that was said is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

from recipes.data.conversations import ASSISTANT, Conversation

Messages = list[dict[str, Any]]
Span = tuple[int, int]

# Placeholder for a text.
_ANY = "@@ what the assistant says @@"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# A reference to an earlier call, which few templates write; it says nothing that is to be learned.
_REFERENCES = frozenset(("tool_call_id",))


class SpanError(ValueError):
    """Error of a conversation that a chat template cannot render for training. Its text is the rule."""


class Render(Protocol):
    """Renders messages; raises `SpanError` where the template rejects them."""

    def __call__(self, messages: Messages, *, tools: bool = True, prompt: bool = False) -> str:
        """Renders.

        Args:
            messages: The messages.
            tools: Whether the conversation's tools are given to the template.
            prompt: Whether the template adds what it writes before a reply that is to be generated.
        """


def counted_replies(conversation: Conversation) -> list[int]:
    """Returns the indices of the assistant's messages that count for the loss."""
    return [
        i
        for i, message in enumerate(conversation.messages)
        if message["role"] == ASSISTANT and i not in conversation.uncounted
    ]


def find_span(render: Render, messages: Messages, i: int, text: str, ends: Iterable[str]) -> Span:
    """Finds the reply of message i, as (first character, one past the last).

    It begins behind the text that the template writes before any reply, and ends with the first token behind
    the content that ends a turn; without such a token, where the message's text ends.

    Args:
        render: The template.
        messages: The conversation.
        i: Index of the message.
        text: The whole conversation, rendered.
        ends: Tokens that end a turn.

    Raises:
        SpanError: The reply cannot be located.
    """
    upto = render(messages[: i + 1])
    if not text.startswith(upto):
        raise SpanError(
            f"the template changes the text up to message {i + 1} when the conversation continues, so that "
            "the reply cannot be located"
        )
    other = render([*messages[:i], {"role": ASSISTANT, "content": _ANY}])
    header, tail = other.partition(_ANY)[0], other.rpartition(_ANY)[2]
    if _ANY not in other or not upto.startswith(header):
        # E.g. a thought or a call stands where none is written for other replies.
        header = _prompt(render, messages[:i])
        if not header or not upto.startswith(header):
            raise SpanError(f"the template begins message {i + 1} otherwise than it begins other replies")
    end = len(upto)
    if _ANY in other and upto.endswith(tail):
        end += _end_of_turn(tail, ends) - len(tail)
    elif upto.rstrip().endswith(
        tuple(filter(None, ends))
    ):  # e.g. turns that call a tool end by another token
        end = len(upto.rstrip())
    return len(header), end


def _prompt(render: Render, before: Messages) -> str:
    """Renders what precedes a reply that is to be generated; empty where that cannot be told."""
    try:
        return render(before, prompt=True)
    except SpanError:  # some templates reject a conversation of no messages
        return ""


def _end_of_turn(tail: str, ends: Iterable[str]) -> int:
    """Returns where the first token that ends a turn ends in the text behind a reply."""
    found = [(tail.find(token), -len(token)) for token in ends if token and token in tail]
    if not found:
        return len(tail)
    at, length = min(found)
    return at - length


def check_replies(conversation: Conversation, text: str, spans: dict[int, Span] | list[Span]) -> None:
    """Checks that each counted reply's text, and its thought, lie in its span.

    Args:
        conversation: The conversation.
        text: It, rendered.
        spans: The span of each counted reply; or spans that belong to all replies together.

    Raises:
        SpanError: A reply's text is not written whole.
    """
    for i in counted_replies(conversation):
        message = conversation.messages[i]
        own = [spans[i]] if isinstance(spans, dict) else spans
        written = "".join(text[start:end] for start, end in own)
        for field in ("content", *_THOUGHTS):
            if field in message and not _holds(written, message[field]):
                what = "reply" if field == "content" else repr(field)
                raise SpanError(
                    f"the template does not write the whole {what} of message {i + 1} into the reply (some "
                    "templates cut thoughts)"
                )


def check_written(render: Render, conversation: Conversation, text: str) -> None:
    """Checks that the template writes everything else: tools, further fields, messages that do not count.

    Raises:
        SpanError: It does not; names the message and the field.
    """
    messages = conversation.messages
    if conversation.tools and _same(render, messages, text, tools=False):
        raise SpanError("the row has 'tools', which the template does not write")
    counted = set(counted_replies(conversation))
    for i, message in enumerate(messages):
        for field in message.keys() - {"role", "content"} - _REFERENCES:
            less = {name: value for name, value in message.items() if name != field}
            if _same(render, [*messages[:i], less, *messages[i + 1 :]], text):
                raise SpanError(f"message {i + 1} has the field {field!r}, which the template does not write")
        _check_calls(render, messages, i, text)
        if i not in counted and message["content"].strip():
            _check_context(render, messages, i, text)


def _check_context(render: Render, messages: Messages, i: int, text: str) -> None:
    """Checks that a message that is no target is written; only a reply may lose a part, its thought."""
    message, content = messages[i], messages[i]["content"]
    # Its text may stand in another message, too.
    absent = _same(render, [*messages[:i], message | {"content": _ANY}, *messages[i + 1 :]], text)
    cut = message["role"] != ASSISTANT and not _holds(text, content) and not _holds(text, _quoted(content))
    if absent or cut:
        whole = "" if absent else "the whole of "
        raise SpanError(f"the template does not write {whole}message {i + 1}, of {message['role']!r}")


def _quoted(part: str) -> str:
    """Returns a text as it stands within JSON, as some templates write what tools return."""
    return json.dumps(part, ensure_ascii=False)[1:-1]


def _check_calls(render: Render, messages: Messages, i: int, text: str) -> None:
    """Checks that each call of a message is written, with its arguments."""
    calls = messages[i].get("tool_calls", [])
    for j, call in enumerate(calls):
        bare = {"arguments": {}}
        changed = [
            [*calls[:j], *calls[j + 1 :]],
            [*calls[:j], call | ({"function": call["function"] | bare} if "function" in call else bare)]
            + calls[j + 1 :],
        ]
        if not call.get("function", call)["arguments"]:
            del changed[1]
        for other in changed:
            if _same(render, [*messages[:i], messages[i] | {"tool_calls": other}, *messages[i + 1 :]], text):
                raise SpanError(f"the template does not write call {j + 1} of message {i + 1} whole")


def _same(render: Render, messages: Messages, text: str, tools: bool = True) -> bool:
    """Returns whether other messages give the same words; a template that rejects them sees the change."""
    try:
        return render(messages, tools=tools).split() == text.split()
    except SpanError:
        return False


def _holds(text: str, part: Any) -> bool:
    """Returns whether a text holds another, apart from white space, which templates trim and add."""
    if not isinstance(part, str):
        return True  # its field is compared by rendering without it
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
