"""Replies that call tools: rendered by the template, learned as a whole, or refused by row and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe.errors import DataError
from recipes.data.chat_template import ChatFormat
from recipes.data.config import DataConfig
from tests.grid import each
from tests.recipes.data.chat_cases import (
    BOS,
    BOT,
    END,
    PLAIN,
    SYS,
    USER,
    A,
    B,
    C,
    D,
    E,
    F,
    save_tokenizer,
    talk,
)
from tests.recipes.data.test_conversations import encode, read, with_fields

_CALLS = (
    "{% for c in m.tool_calls or [] %}{% set c = c.function or c %} <sys> {{ c.name }}"
    "{% for k, v in c.arguments.items() %} {{ k }} {{ v }}{% endfor %}{% endfor %}"
)


def template(reply: str) -> str:
    """A template whose replies are written so; CALLS stands for the calls, TEXT for the text."""
    reply = reply.replace("CALLS", _CALLS).replace("TEXT", " {{ m.content }}")
    return (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %}"
        + reply
        + "{% else %}<user> {{ m.content }} <end>{% endif %}{% endfor %}"
    )


# As in Qwen's and Hermes' templates: the calls behind the text of the reply.
_AFTER = "{% if m.content %}TEXT{% endif %}CALLS <end>"
AFTER = template("<bot>" + _AFTER)
MARKED = template("<bot>{% generation %}" + _AFTER + "{% endgeneration %}")
# As DeepSeek's: the calls are written only where there is no text at all.
NULL = template("<bot>{% if m.content is none %}CALLS{% else %}TEXT{% endif %} <end>")
# As Mistral's: no header before a call, another before a text.
BARE = template("{% if m.tool_calls %}CALLS{% else %}<bot>TEXT{% endif %} <end>")
# As Llama 3's: the turn of a call ends by another token, here <bot>.
ENDS = template("<bot>TEXTCALLS{% if m.tool_calls %} <bot>\n{% else %} <end>{% endif %}")


def call(arguments: Any = None, name: str = "c", **more: Any) -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments} | more}


def row(*calls: Any, content: Any = None) -> dict[str, Any]:
    """A question, the calls, what the tool said, and the answer."""
    said = talk("user: a", "bot: x", "user: f", "bot: b")
    with_fields(said, 2, role="tool", tool_call_id="1")
    return with_fields(said, 1, tool_calls=list(calls), content=content)


@each("arguments", [{"d": "e"}, '{"d": "e"}'], ids=["object", "text"])
@each("template", [AFTER, MARKED, NULL], ids=["after", "marked", "null"])
def test_a_call_is_rendered_and_learned(tmp_path: Path, template: str, arguments: Any) -> None:
    ids, own = encode(tmp_path, template, row(call(arguments)))
    #                0    1   2   3    4    5  6  7  8   9    10  11  12   13  14  15
    assert ids == [BOS, USER, A, END, BOT, SYS, C, D, E, END, USER, F, END, BOT, B, END]
    assert own == [5, 6, 7, 8, 9, 14, 15]
    # Without the field `function`, as transformers' own documentation has it.
    assert encode(tmp_path, template, row(call(arguments)["function"])) == (ids, own)


def test_transformers_renders_and_marks_the_same(tmp_path: Path) -> None:
    # It drops a marked stretch that begins with a space.
    marks = template("<bot> {% generation %}{{ m.content }}CALLS <end>{% endgeneration %}")
    said = row(call({"d": "e"}), call({"e": "d"}, "b"), content="f")
    ids, own = encode(tmp_path, marks, said)
    tokenizer = ChatFormat(
        DataConfig(path="x", format="chat"), save_tokenizer(tmp_path / "t", marks)
    ).tokenizer
    theirs = tokenizer.apply_chat_template(
        said["messages"], tools=None, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"]
    assert own == [i for i, counts in enumerate(theirs["assistant_masks"]) if counts]


def test_a_call_may_begin_and_end_otherwise_than_a_text(tmp_path: Path) -> None:
    ids, own = encode(tmp_path, BARE, row(call({"d": "e"})))
    assert ids == [BOS, USER, A, END, SYS, C, D, E, END, USER, F, END, BOT, B, END]
    assert own == [4, 5, 6, 7, 8, 13, 14]
    ids, own = encode(tmp_path, ENDS, row(call({"d": "e"})))
    assert ids == [BOS, USER, A, END, BOT, SYS, C, D, E, BOT, USER, F, END, BOT, B, END]
    assert own == [5, 6, 7, 8, 9, 14, 15]


def test_a_call_of_weight_zero_is_context(tmp_path: Path) -> None:
    _, own = encode(tmp_path, AFTER, with_fields(row(call({"d": "e"})), 1, weight=0))
    assert own == [14, 15]


@each(
    ("template", "calls", "said"),
    [
        (
            PLAIN,
            [call({"d": "e"})],
            "message 2 has the field 'tool_calls', which the template does not write",
        ),
        (
            AFTER.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            [call(), call()],
            "write call . of",
        ),
        (
            AFTER.replace("{{ k }} {{ v }}", ""),
            [call({"d": "e"})],
            "does not write call 1 of message 2 whole",
        ),
        # Outside of the stretch that counts.
        (
            template("<bot>CALLS{% generation %}TEXT <end>{% endgeneration %}"),
            [call({"d": "e"})],
            "writes calls of tools outside of the replies that it marks",
        ),
        (AFTER, [1], "under 'tool_calls' of message 2 what names no function"),
        (AFTER, [{"function": {"arguments": {}}}], "names no function"),
        (AFTER, [call("{")], "arguments in 'tool_calls' of message 2, a text that is not JSON"),
        (AFTER, [call("[1]")], "has a list as arguments in 'tool_calls' of message 2, not an object"),
    ],
)
def test_what_the_template_or_the_row_lacks_is_named(
    tmp_path: Path, template: str, calls: list[Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"r.jsonl:1.*{said}"):
        encode(tmp_path, template, row(*calls))


def test_a_call_without_arguments(tmp_path: Path) -> None:
    for nothing in (None, "", {}, "{}"):
        assert encode(tmp_path, AFTER, row(call(nothing)))[1] == [5, 6, 7, 12, 13]
    assert read(tmp_path, row(call()))[0][1]["tool_calls"][0]["function"]["arguments"] == {}
