"""Which tokens of a conversation are the assistant's, by hand; and what templates and rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe.errors import DataError
from recipes.data.chat_template import ChatFormat, carry_template, check_chat_template
from recipes.data.chat_tokens import check_first_row
from recipes.data.config import DataConfig
from recipes.data.conversations import Conversation, read_conversations
from recipes.data.sources import check_paths, read_documents
from tests.grid import each
from tests.recipes.data.chat_cases import (
    BARE,
    BOS,
    BOT,
    END,
    FORGETS,
    LAST_ONLY,
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


def encode(folder: Path, template: str, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids, and the places of those that count."""
    chat = ChatFormat(DataConfig(path="x", format="chat"), save_tokenizer(folder, template))
    ids, own = chat.encode(Conversation(row["messages"], "rows.jsonl:7", 0))
    return ids.tolist(), own.nonzero()[0].tolist()


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_one_reply(tmp_path: Path, template: str) -> None:
    ids, own = encode(tmp_path, template, talk("user: a b", "bot: c d"))
    assert ids == [BOS, USER, A, B, END, BOT, C, D, END]
    # c, d and the end of the turn; <bot> is given when the reply is asked for.
    assert own == [6, 7, 8]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_system_prompt_and_several_turns(tmp_path: Path, template: str) -> None:
    row = talk("sys: f", "user: a", "bot: b c", "user: d", "bot: e")
    ids, own = encode(tmp_path, template, row)
    #                0    1   2   3    4   5    6   7   8   9   10    11  12   13   14  15
    assert ids == [BOS, SYS, F, END, USER, A, END, BOT, B, C, END, USER, D, END, BOT, E, END]
    assert own == [8, 9, 10, 15, 16]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_users_last_word_does_not_count(tmp_path: Path, template: str) -> None:
    ids, own = encode(tmp_path, template, talk("user: a", "bot: b", "user: c"))
    assert ids == [BOS, USER, A, END, BOT, B, END, USER, C, END]
    assert own == [5, 6]


def test_the_assistant_may_begin_and_may_speak_twice(tmp_path: Path) -> None:
    ids, own = encode(tmp_path, PLAIN, talk("bot: a", "bot: b"))
    assert ids == [BOS, BOT, A, END, BOT, B, END]
    assert own == [2, 3, 5, 6]


def test_a_template_without_headers(tmp_path: Path) -> None:
    ids, own = encode(tmp_path, BARE, talk("user: a", "bot: b", "user: b", "bot: b b"))
    assert ids == [BOS, USER, A, USER, B, END, USER, B, USER, B, B, END]
    assert own == [4, 5, 9, 10, 11]


def test_a_reply_that_says_what_was_said_before(tmp_path: Path) -> None:
    # The text of the reply stands in the question too: it must not be taken for it.
    ids, own = encode(tmp_path, PLAIN, talk("user: a b", "bot: a b", "user: a b", "bot: a b"))
    assert ids[6:9] == ids[14:17] == [A, B, END]
    assert own == [6, 7, 8, 14, 15, 16]


def test_a_space_before_a_word_is_of_its_token(tokenizer_dir: Path) -> None:
    template = tokenizer_dir / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    cfg = DataConfig(path="x", format="chat", chat_template=str(template))
    chat = ChatFormat(cfg, tokenizer_dir)
    row = talk("user: the quick brown fox", "bot: jumps over the lazy dog", "user: dog", "bot: fox")
    ids, own = chat.encode(Conversation(row["messages"], "here", 0))
    text = chat.tokenizer.decode(ids.tolist())
    assert (
        text == "user: the quick brown fox\nassistant: jumps over the lazy dog\nuser: dog\nassistant: fox\n"
    )
    said = [chat.tokenizer.decode(ids[a:b].tolist()) for a, b in runs(own.tolist())]
    assert [words.strip() for words in said] == ["jumps over the lazy dog", "fox"]


def runs(own: list[bool]) -> list[tuple[int, int]]:
    """Where stretches of True begin and end."""
    edges = [i for i in range(len(own) + 1) if (i < len(own) and own[i]) != (i > 0 and own[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("template", [LAST_ONLY, FORGETS])
def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, template: str) -> None:
    row = talk("user: a", "bot: b c", "user: d", "bot: e f")
    with pytest.raises(
        DataError, match="rows.jsonl:7.*up to message 2 when the conversation continues.*data.chat_template"
    ):
        encode(tmp_path, template, row)


def test_one_turn_needs_no_such_property(tmp_path: Path) -> None:
    _, own = encode(tmp_path, FORGETS, talk("user: a", "bot: b c"))
    assert own == [3, 4]


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match="rows.jsonl:7.*rejects it .no system here"):
        encode(tmp_path, template, talk("sys: a", "bot: b"))


def test_a_conversation_without_a_reply_is_empty(tmp_path: Path) -> None:
    assert encode(tmp_path, PLAIN, talk("user: a")) == ([], [])


def test_a_tokenizer_without_a_template_is_a_mistake(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", None)
    cfg = DataConfig(path="x", format="chat")
    [mistake] = check_chat_template(cfg, folder)
    assert str(mistake).startswith("data.chat_template")
    assert "has no chat template. Give a jinja file by data.chat_template" in str(mistake)
    with pytest.raises(DataError, match="has no chat template"):
        ChatFormat(cfg, folder)
    [mistake] = check_chat_template(cfg, None)
    assert "default model's tokenizer" in str(mistake)
    missing = DataConfig(path="x", format="chat", chat_template=str(tmp_path / "no.jinja"))
    [mistake] = check_chat_template(missing, folder)
    assert "is no file" in str(mistake)
    assert check_chat_template(DataConfig(), None) == []
    with pytest.raises(ValueError, match="is for chat data"):
        DataConfig(chat_template="x.jinja")


@each(
    ("files", "said"),
    [
        ({"tokenizer_config.json": [{"name": "default", "template": PLAIN}]}, None),
        ({"chat_template.jinja": PLAIN, "tokenizer_config.json": "x"}, None),
        (
            {"tokenizer_config.json": [{"name": "rag", "template": PLAIN}]},
            "named rag, and none named default",
        ),
        ({"tokenizer_config.json": [{"name": "default"}]}, "are not all a name and a template"),
        ({"additional_chat_templates/tool_use.jinja": PLAIN}, "named tool_use, and none named default"),
        ({"chat_template.json": PLAIN}, "that in chat_template.json is a processor's"),
        ({"processor_config.json": PLAIN}, "that in processor_config.json is a processor's"),
        ({"tokenizer_config.json": ""}, "has no chat template"),
    ],
)
def test_places_of_templates(tmp_path: Path, files: dict[str, Any], said: str | None) -> None:
    folder = save_tokenizer(tmp_path / "t", None)
    for name, template in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        before = json.loads(path.read_text()) if path.is_file() else {}
        jinja = path.suffix == ".jinja"
        path.write_text(template if jinja else json.dumps(before | {"chat_template": template}))
    cfg = DataConfig(path="x", format="chat")
    mistakes = check_chat_template(cfg, folder)
    assert bool(mistakes) == bool(said)
    if said is None:  # transformers, which loads it, agrees
        assert ChatFormat(cfg, folder).template == PLAIN
    else:
        assert said in mistakes[0].rule


def test_a_file_that_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    [mistake] = check_chat_template(
        DataConfig(path="x", format="chat", chat_template=str(tmp_path / "t.jinja")), None
    )
    assert "is not UTF-8" in mistake.rule


def test_a_template_of_ones_own_goes_before_and_travels(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", BARE)
    (tmp_path / "mine.jinja").write_text(PLAIN)
    cfg = DataConfig(path="x", format="chat", chat_template=str(tmp_path / "mine.jinja"))
    assert check_chat_template(cfg, folder) == []
    ids, _ = ChatFormat(cfg, folder).encode(Conversation(talk("user: a", "bot: b")["messages"], "here", 0))
    assert ids.tolist() == [BOS, USER, A, END, BOT, B, END]
    carry_template(cfg, folder)
    plain = DataConfig(path="x", format="chat")
    assert ChatFormat(plain, folder).template == PLAIN


def test_the_other_form_of_rows(tmp_path: Path) -> None:
    turns = [("system", "f"), ("human", "a"), ("gpt", "b")]
    other = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    path = Path(write_rows(tmp_path / "r.jsonl", [other, talk("sys: f", "user: a", "bot: b")]))
    first, second = read_conversations(path)
    assert first.messages == second.messages
    assert (first.place, second.place) == (f"{path}:1", f"{path}:2")
    documents = read_documents(DataConfig(path=str(path), format="chat"), lambda line: None)
    assert [document.text for document in documents] == ["f\na\nb"] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "is a JSON list, not an object"),
        ({"text": "a"}, "has no 'messages'; it has 'text'"),
        ({"messages": "a"}, "has a str under 'messages', not a list"),
        ({"messages": []}, "has no message under 'messages'"),
        ({"messages": ["a"]}, "has a str as message 1, not an object"),
        ({"messages": [{"role": "user"}]}, "has str and NoneType as role and content of message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "has a part of type 'image' in message 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "under 'tool_calls' of message 1 what names no function",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair in message 1"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "has 'cat' as the speaker of message 1"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path: Path, row: Any, said: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", [talk("user: a", "bot: b"), row])
    with pytest.raises(DataError, match=f"r.jsonl:2.*{said}"):
        list(read_conversations(Path(path)))


def test_the_first_row_is_tried_before_a_run(tmp_path: Path) -> None:
    cfg = DataConfig(path=write_rows(tmp_path / "r.jsonl", [talk("user: a", "bot: b")]), format="chat")
    assert check_first_row(cfg, save_tokenizer(tmp_path / "t", PLAIN)) == []
    (mistake,) = check_first_row(cfg, save_tokenizer(tmp_path / "u", "{% for m in messages %}"))
    assert "r.jsonl:1" in mistake.value and "the chat template rejects it" in mistake.rule
    assert check_first_row(DataConfig(), tmp_path) == []


def test_paths_are_checked_as_chat_data(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "r.jsonl", [talk("user: a", "bot: b")])
    assert check_paths(DataConfig(path=good, format="chat")) == []
    [mistake] = check_paths(DataConfig(path=good))
    assert "has no 'text'" in mistake.rule
    assert "data=chat" in mistake.remedy
    [mistake] = check_paths(DataConfig(format="chat"))
    assert (mistake.path, mistake.rule) == ("data.path", "there is no chat data to fall back on")
    (tmp_path / "a.txt").write_text("a")
    [mistake] = check_paths(DataConfig(path=str(tmp_path / "a.txt"), format="chat"))
    assert "chat data is JSON, and this is text" in mistake.rule
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "a"}])
    [mistake] = check_paths(DataConfig(path=bad, format="chat"))
    assert "has no 'messages'" in mistake.rule
