"""JSON of users' files: what is read, and the clause for what is not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from recipes.runtime import user_json
from recipes.runtime.user_json import UserJsonError, read_json_file, read_json_object, read_json_text
from tests.grid import each


@each(
    "text",
    [
        '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9 \\u0000"}}',
        '{"a": 1, "a": 1}',
        '"text"',
        '{"n": ' + "7" * 4000 + "}",
        "[" * 200 + "]" * 200,
        '{"a": Infinity}',
    ],
)
def test_json_is_read_as_the_library_reads_it(text: str) -> None:
    assert (
        read_json_text(text, "f:1")
        == read_json_text(b"\xef\xbb\xbf" + text.encode(), "f:1")
        == json.loads(text)
    )


@each(
    ("text", "clause"),
    [
        ("{", "is not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ('{\n"a": x}', "is not JSON (Expecting value at line 2, column 6)"),
        ("", "is not JSON (Expecting value at column 1)"),
        (b'{"a": "\xff"}', "is not UTF-8 (invalid start byte)"),
        ("[" * 100_000 + "]" * 100_000, "nests lists and objects too deeply to be read"),
        ('{"a":' * 100_000, "nests lists and objects too deeply to be read"),
        ('{"a": ' + "9" * 5000 + "}", "has an integer of more than 4300 digits"),
        ('{"b": {"a": 1, "a": 2}}', "has the field 'a' twice, with different values"),
        (b"\0" * 50, "is not JSON (Expecting value at column 1)"),
        ('{"a": 1, "b": 0, "a": 2, "a": 1}', "has the field 'a' twice, with different values"),
    ],
)
def test_what_is_wrong_is_one_clause(text: str | bytes, clause: str) -> None:
    with pytest.raises(UserJsonError) as caught:
        read_json_text(text, "rows.jsonl:7")
    assert (caught.value.place, caught.value.clause, str(caught.value)) == ("rows.jsonl:7", clause, clause)
    assert pickle.loads(pickle.dumps(caught.value)).place == "rows.jsonl:7"


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserJsonError, match="^cannot be read .No such file or directory.$"):
        read_json_file(path)
    with pytest.raises(UserJsonError, match="^is no regular file$"):
        read_json_file(tmp_path)
    os.mkfifo(path)
    with pytest.raises(UserJsonError, match="^is no regular file$"):
        read_json_file(path)
    with pytest.raises(UserJsonError, match="^cannot be read"):
        read_json_file(Path("a\0b"))
    path.unlink()
    path.write_text('{"a": 1}')
    assert read_json_file(path) == {"a": 1}
    monkeypatch.setattr(user_json, "LARGEST_FILE", 7)
    with pytest.raises(UserJsonError, match="^holds 8 bytes, far more"):
        read_json_file(path)
    path.write_text("[]")
    with pytest.raises(UserJsonError, match="^holds a list instead of a JSON object"):
        read_json_object(path)
