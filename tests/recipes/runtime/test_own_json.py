"""Our own JSON files after somebody else had them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe.errors import CheckpointError
from recipes.runtime.own_json import read_json_object
from recipes.runtime.run_file import read_run_file, write_run_file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not valid JSON"),
        (b'{"a": ', "it is not valid JSON"),
        (b"\0" * 50, "it is not valid JSON"),
        (b"\xff\xfe", "it is not valid JSON"),
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"a":' * 100_000, "it is nested too deep"),
        (b"[]", "it holds list instead of a JSON object"),
        (b"null", "it holds NoneType instead"),
        (b"1" * 9999, "it is not valid JSON"),
        (b'{"a": "' + b"x" * 100 + b'"}', "it has 109 bytes, more than 100"),
    ],
)
def test_what_is_no_object_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json_object(path, 100 if len(content) == 109 else 1 << 20)


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="it is no regular file"):
        read_json_object(tmp_path / "pipe")
    with pytest.raises(OSError):
        read_json_object(tmp_path / "folder")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"identity": 5}',
        '{"identity": []}',
        '{"parts": {}}',
        '{"parts": [5]}',
        '{"parts": [{}]}',
        '{"parts": [{"started": "now"}]}',
        '{"parts": [{"started": NaN, "steps_s": 0}]}',
        '{"parts": [{"started": 1, "ended": null}]}',
        '{"started": "x"}',
        '{"fork": 1}',
        '{"run_id": 7}',
        '{"launch": "x"}',
        "[" * 100_000,
    ],
)
def test_a_run_file_of_other_kinds_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"resume=.*run\.json': .* Restore it, or start a new run"
    ) as caught:
        write_run_file(tmp_path, a=1)
    assert len(caught.value.mistakes) == 1
    assert (tmp_path / "run.json").read_text() == content


def test_a_pipe_in_the_place_of_a_run_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        read_run_file(tmp_path)
