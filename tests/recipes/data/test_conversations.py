"""What rows say beside role and content: honoured, refused by name, or told."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from moe.errors import DataError
from recipes.data import chat_template
from recipes.data.chat_template import ChatFormat
from recipes.data.chat_tokens import ensure_chat_tokens
from recipes.data.config import DataConfig
from recipes.data.conversations import Conversation, read_conversations
from tests.grid import each
from tests.recipes.data.chat_cases import (
    BOS,
    BOT,
    END,
    MARKED,
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
    write_rows,
)

# The tools before the messages, and a name before what is said.
TOOLS = (
    "<s>{% for t in tools or [] %}<sys> {{ t.name }} <end>{% endfor %}"
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}> "
    "{% if m.name %}{{ m.name }} {% endif %}{{ m.content }} <end>{% endfor %}"
)
# A thought before each reply, empty where there is none; generation is given <bot>.
THINKS = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<bot> <sys> "
    "{% set said = m.content.split('</think>') %}{% set thought = m.reasoning_content or '' %}"
    "{% if said | length > 1 %}{% set thought = said[0].removeprefix('<think>') %}{% endif %}"
    "{{ thought.strip() }} <sys> {{ said[-1].strip() }} <end>"
    "{% else %}<user> {{ m.content }} <end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
# Thoughts are cut, as DeepSeek-R1's template does.
CUTS = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}> "
    "{{ m.content.split('</think>')[-1] }} <end>{% endfor %}"
)


def read(folder: Path, row: Any, ignored: tuple[str, ...] = ()) -> Conversation:
    [conversation] = read_conversations(Path(write_rows(folder / "r.jsonl", [row])), ignored)
    return conversation


def encode(folder: Path, template: str, row: Any) -> tuple[list[int], list[int]]:
    """Ids, and the places of those that count."""
    chat = ChatFormat(DataConfig(path="x", format="chat"), save_tokenizer(folder / "t", template))
    ids, own = chat.encode(read(folder, row))
    return ids.tolist(), own.nonzero()[0].tolist()


def with_fields(row: dict[str, Any], i: int, **fields: Any) -> dict[str, Any]:
    """The row, its message i with more fields."""
    row["messages"][i] |= fields
    return row


@each("field", ["system", "system_prompt"])
def test_a_system_prompt_of_the_row_becomes_the_first_message(tmp_path: Path, field: str) -> None:
    row = with_fields(talk("user: a", "bot: b", "user: a", "bot: c") | {field: "f"}, 1, weight=0)
    ids, own = encode(tmp_path, PLAIN, row)
    assert ids == [BOS, SYS, F, END, USER, A, END, BOT, B, END, USER, A, END, BOT, C, END]
    assert own == [14, 15]
    assert read(tmp_path, talk("user: a") | {field: ""}).messages == talk("user: a")["messages"]
    with pytest.raises(DataError, match=f"r.jsonl:1.*several system prompts, one of them under '{field}'"):
        read(tmp_path, talk("sys: e", "user: a") | {field: "f"})
    with pytest.raises(DataError, match=f"has a list under '{field}', not a text"):
        read(tmp_path, talk("user: a") | {field: ["f"]})


@each("given", [lambda tools: tools, json.dumps])
def test_tools_are_rendered(tmp_path: Path, given: Any) -> None:
    row = talk("user: a", "bot: b") | {"tools": given([{"name": "c"}, {"name": "d"}])}
    ids, own = encode(tmp_path, TOOLS, row)
    assert ids == [BOS, SYS, C, END, SYS, D, END, USER, A, END, BOT, B, END]
    assert own == [11, 12]
    with pytest.raises(DataError, match="r.jsonl:1': the row has 'tools', which the template does not write"):
        encode(tmp_path, PLAIN, row)
    assert encode(tmp_path, PLAIN, talk("user: a", "bot: b") | {"tools": []})[1] == [5, 6]


def test_a_template_for_tools_is_taken_for_rows_with_tools(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", PLAIN)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    chat = ChatFormat(DataConfig(path="x", format="chat"), folder)
    row = talk("user: a", "bot: b")
    assert chat.encode(read(tmp_path, row | {"tools": [{"name": "c"}]}))[0].tolist()[:3] == [BOS, SYS, C]
    assert chat.encode(read(tmp_path, row))[0].tolist() == [BOS, USER, A, END, BOT, B, END]


@each("field", ["weight", "train", "loss_mask", "trainable", "loss"])
@each("value", [0, False, 0.0])
@each("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_reply_of_weight_zero_is_context(tmp_path: Path, field: str, value: Any, template: str) -> None:
    row = with_fields(talk("user: a", "bot: b", "user: c", "bot: d"), 1, **{field: value})
    row = with_fields(row, 3, **{field: not value})
    ids, own = encode(tmp_path, template, row)
    assert ids == [BOS, USER, A, END, BOT, B, END, USER, C, END, BOT, D, END]
    assert own == [11, 12]


def test_weights_that_cannot_be_honoured(tmp_path: Path) -> None:
    row = talk("user: a", "bot: b")
    for value in (0.5, 2, "0", float("nan")):
        with pytest.raises(
            DataError, match="r.jsonl:1.*has weight=.* in message 2; only 0, 1, true and false"
        ):
            read(tmp_path, with_fields(talk("user: a", "bot: b"), 1, weight=value))
    with pytest.raises(
        DataError, match="has train=True in message 1, and only the assistant's can be learned"
    ):
        read(tmp_path, with_fields(talk("user: a", "bot: b"), 0, train=True))
    assert encode(tmp_path, PLAIN, row | {"weight": 0}) == ([], [])
    both = MARKED.replace(" <end>{% endgen", "{% endgeneration %}{% generation %} <end>{% endgen")
    first = with_fields(talk("user: a", "bot: b", "user: c", "bot: d"), 1, weight=0)
    with pytest.raises(DataError, match="marks 4 stretches for 2 replies"):
        encode(tmp_path, both, first)


def test_thoughts_that_the_template_writes_count(tmp_path: Path) -> None:
    plain = encode(tmp_path, THINKS, talk("user: a", "bot: b"))
    assert plain == ([BOS, USER, A, END, BOT, SYS, SYS, B, END], [7, 8])
    field = with_fields(talk("user: a", "bot: b"), 1, reasoning_content="c d")
    inline = talk("user: a", "bot: <think>c d</think>b")
    thought = ([BOS, USER, A, END, BOT, SYS, C, D, SYS, B, END], [5, 6, 7, 8, 9, 10])
    assert encode(tmp_path, THINKS, field) == thought
    with pytest.raises(DataError, match="does not write the whole reply of message 2"):
        encode(tmp_path, THINKS, inline)  # the marks of a thought are written in another form
    kept = THINKS.replace("{{ thought.strip() }} <sys>", "<think>{{ thought.strip() }}</think>\n\n")
    ids, own = encode(tmp_path, kept, inline)
    assert (ids[3:6], ids[-2:], own) == ([END, BOT, SYS], [B, END], [5, 6, 7, 8, 9])


def test_thoughts_that_the_template_cuts_are_refused(tmp_path: Path) -> None:
    rule = "r.jsonl:1': the template does not write the whole reply of message 2"
    with pytest.raises(DataError, match=rule):
        encode(tmp_path, CUTS, talk("user: a", "bot: c</think> b"))
    with pytest.raises(DataError, match="does not write the whole 'reasoning_content' of message 2"):
        encode(tmp_path, PLAIN, with_fields(talk("user: a", "bot: b"), 1, reasoning_content="c"))
    # As context, a reply may lose its thought.
    row = with_fields(talk("user: a", "bot: c</think> b", "user: a", "bot: d"), 1, weight=0)
    assert encode(tmp_path, CUTS, row)[1] == [10, 11]


def test_other_fields_of_messages(tmp_path: Path) -> None:
    row = with_fields(talk("user: a", "bot: b"), 0, name="e")
    assert encode(tmp_path, TOOLS, row)[0] == [BOS, USER, E, A, END, BOT, B, END]
    for field, value in (("name", "e"), ("mood", {"deep": [1]})):
        rule = f"message 1 has the field '{field}', which the template does not write. .*data.ignored_fields"
        with pytest.raises(DataError, match=rule):
            encode(tmp_path, PLAIN, with_fields(talk("user: a", "bot: b"), 0, **{field: value}))
    bare = read(tmp_path, with_fields(row, 1, mood=None, weight=None), ("name",))
    assert bare.messages == talk("user: a", "bot: b")["messages"]


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    deaf = "{% for m in messages if m.role != 'system' %}" + PLAIN.partition("%}")[2]
    with pytest.raises(DataError, match="does not write message 1, of 'system'"):
        encode(tmp_path, deaf, talk("sys: f", "user: a", "bot: b"))


def test_a_message_that_another_one_repeats_is_not_taken_for_written(tmp_path: Path) -> None:
    deaf = "{% for m in messages if m.role != 'system' %}" + PLAIN.partition("%}")[2]
    with pytest.raises(DataError, match="does not write message 1, of 'system'"):
        encode(tmp_path, deaf, talk("sys: a", "user: a", "bot: b"))


def test_a_message_that_the_template_cuts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not write the whole of message 1, of 'user'"):
        encode(tmp_path, CUTS, talk("user: c</think> a", "bot: b"))
    # What stands in JSON is written whole.
    quotes = PLAIN.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'user' else m.content }}")
    assert encode(tmp_path, quotes, talk('user: "a"\n c', "bot: b"))[1] == [6, 7]


def test_contents_of_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"text": "b", "type": "text"}]
    assert read(tmp_path, with_fields(talk("user: x"), 0, content=parts)).messages[0]["content"] == "a b"
    for part, said in (
        ({"type": "image_url", "image_url": "x"}, "part of type 'image_url' in message 1, and only text"),
        ({"type": "text", "text": "a", "annotations": [1]}, "the field 'annotations' in a part of message 1"),
        ({"type": "text"}, "part of type 'text'"),
        ("a", "part of type 'str'"),
    ):
        with pytest.raises(DataError, match=said):
            read(tmp_path, with_fields(talk("user: x"), 0, content=[part]))


@each(
    ("row", "said"),
    [
        (talk("user: a") | {"functions": [{"name": "f"}]}, "has the field 'functions', which is not read"),
        (talk("user: a") | {"images": ["a.png"]}, "has the field 'images'"),
        (talk("user: a") | {"systemMessage": "f"}, "has the field 'systemMessage'"),
        (talk("user: a") | {"available_tools": ["f"]}, "has the field 'available_tools'"),
        (talk("user: a") | {"loss_weight": 0.5}, "has the field 'loss_weight'"),
        (talk("user: a") | {"token_mask": [0, 1]}, "has the field 'token_mask'"),
        (talk("user: a") | {"enable_thinking": False}, "has the field 'enable_thinking'"),
        (talk("user: a") | {"prompt": "b", "response": "c"}, "has the field 'prompt'"),
        (talk("user: a") | {"tools": [1]}, "no list of objects under 'tools'"),
        (talk("user: a") | {"tools": "{"}, "a text under 'tools' that is not JSON"),
        (talk("user: a") | {"conversations": []}, "has both 'messages' and 'conversations'"),
        ({"messages": [{"role": "model", "content": "a"}]}, "the role 'model' in message 1. Name the role"),
        ({"messages": [{"role": "Assistant", "content": "a"}]}, "the role 'Assistant' in message 1"),
        (with_fields(talk("bot: a"), 0, function_call={"name": "f"}), "by the field 'function_call'"),
        (with_fields(talk("bot: a"), 0, name="\ud800"), "half a surrogate pair in message 1"),
    ],
)
def test_rows_that_say_what_is_not_read(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"r.jsonl:1.*{said}"):
        read(tmp_path, row)


def test_fields_of_rows_that_say_nothing_of_the_text_are_told(tmp_path: Path) -> None:
    own = {"source": "x", "prompt": "a", "prompt_id": "y", "num_tools": 2, "score": None}
    rows = [talk("user: a", "bot: b") | {"id": i} | own for i in range(3)]
    cfg = DataConfig(path=write_rows(tmp_path / "r.jsonl", rows), format="chat")
    said: list[str] = []
    ensure_chat_tokens(cfg, save_tokenizer(tmp_path / "t", PLAIN), tmp_path / "cache", said.append)
    assert "data: fields of rows that are not read: id, num_tools, prompt, prompt_id, source" in said


def test_a_reply_ends_with_the_token_that_ends_its_turn(tmp_path: Path) -> None:
    # What a template writes behind the end of a turn is never generated: here a word, elsewhere a newline.
    behind = PLAIN.replace(" <end>", " <end> f <sys>")
    ids, own = encode(tmp_path, behind, talk("user: a", "bot: b", "user: c", "bot: f d"))
    assert ids == [
        BOS,
        USER,
        A,
        END,
        F,
        SYS,
        BOT,
        B,
        END,
        F,
        SYS,
        USER,
        C,
        END,
        F,
        SYS,
        BOT,
        F,
        D,
        END,
        F,
        SYS,
    ]
    assert own == [7, 8, 17, 18, 19]
    no_token = PLAIN.replace(" <end>", " f")
    assert encode(tmp_path, no_token, talk("user: a", "bot: b")) == ([BOS, USER, A, F, BOT, B, F], [5, 6])
    said_before = encode(tmp_path, behind, talk("user: a", "bot: <end> b"))
    assert said_before[0][7:] == [END, B, END, F, SYS] and said_before[1] == [7, 8, 9]


@each(
    "template",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro a(n) %}{{ a(n) if n < 0 else (range(99999) | sum) }}{% endmacro %}"
        "{% for i in range(99999) %}{{ a(i) }}{% endfor %}",
    ],
    ids=["loops", "macro"],
)
def test_a_template_without_end_is_ended(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.05)
    with pytest.raises(DataError, match="r.jsonl:1': the chat template does not end within 0.05 seconds"):
        encode(tmp_path, template, talk("user: a", "bot: b"))


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    for code in ("messages.append(1)", "''.__class__.__mro__", "messages.__init__.__globals__"):
        with pytest.raises(DataError, match="the chat template rejects it"):
            encode(tmp_path, "{{ " + code + " }}", talk("user: a", "bot: b"))


def test_a_template_may_not_take_the_machines_memory(tmp_path: Path) -> None:
    doubled = "{% set ns = namespace(x='ab' * 1000) %}"
    doubled += "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for template in (doubled, "{{ 'ab' * 10**12 }}", "{{ '%1000000000000d' % 5 }}"):
        with pytest.raises(DataError, match="r.jsonl:1': the chat template (takes more than|rejects it)"):
            encode(tmp_path, template, talk("user: a", "bot: b"))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
