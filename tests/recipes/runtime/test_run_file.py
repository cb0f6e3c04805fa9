"""``run.json`` after somebody else had it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe.errors import CheckpointError
from recipes.runtime.run_file import read_run_file, write_run_file


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
