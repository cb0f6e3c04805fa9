"""Scores on request files, against sums worked out by hand over a model whose logits are known."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from moe.errors import ConfigError
from recipes.cap.task_files import Task, TaskQuestion, read_task
from recipes.cap.task_scores import Score, score_task
from tests.grid import each

# The next token is likely to be the successor of the last: a, b, c, ...
_LETTERS = "abcdefgh"
_LIKELY = math.log(0.65 / 0.05)


class _Alphabet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(_LETTERS), 1)
        self.lengths: list[int] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.lengths.append(input_ids.shape[1])
        successors = nn.functional.one_hot((input_ids + 1) % len(_LETTERS), len(_LETTERS)).float()
        return SimpleNamespace(logits=_LIKELY * successors)


def _tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [_LETTERS.index(letter) for letter in text]}


def _score(*questions: tuple[str, tuple[str, ...], int], longest: int | None = None) -> Any:
    made = [TaskQuestion((context,) * len(choices), choices, gold) for context, choices, gold in questions]
    return score_task(_Alphabet(), _tokenizer, Task("t", tuple(made)), longest=longest)


def test_choices_by_likelihood_and_by_bytes() -> None:
    # ln 0.65 for a successor, ln 0.05 for another letter. Of the first question "d" is best either way; of
    # the second "a" (ln 0.05) beats "defa" (3 ln 0.65 + ln 0.05), which is better per byte.
    found = _score(("abc", ("d", "a"), 0), ("abc", ("a", "defa"), 1))
    assert found.accuracy.value == 0.5 and found.accuracy_by_bytes.value == 1.0
    assert (found.questions, found.chance, found.cut) == (2, 0.5, 0)
    nats = -math.log(0.65) - (3 * math.log(0.65) + math.log(0.05))
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / 5)


def test_one_continuation_is_right_if_greedy_decoding_writes_it() -> None:
    found = _score(("abc", ("de",), 0), ("abc", ("df",), 0), ("h", ("a",), 0))
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.accuracy_by_bytes is None and found.chance is None


def test_the_error_is_that_of_a_share() -> None:
    found = _score(*[("abc", ("d", "a"), i % 4 == 0) for i in range(64)])
    assert found.accuracy.value == 0.75
    assert found.accuracy.error == pytest.approx(math.sqrt(0.75 * 0.25 / 64), rel=0.1)


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    found = _score(("abcabcab", ("c", "a"), 0), longest=4)
    assert (found.accuracy, found.cut) == (Score(1.0, 0.0), 2)


def test_lengths_that_differ_share_a_batch_without_effect() -> None:
    together = _score(("abcdefg", ("h", "a"), 0), ("a", ("bcd", "c"), 0))
    alone = [_score(("abcdefg", ("h", "a"), 0)), _score(("a", ("bcd", "c"), 0))]
    assert together.accuracy.value == sum(one.accuracy.value for one in alone) / 2
    assert together.bits_per_byte.value * 4 == pytest.approx(
        alone[0].bits_per_byte.value + 3 * alone[1].bits_per_byte.value
    )


def _row(document: int, text: str, label: Any, choice: int = 0) -> dict[str, Any]:
    return {
        "request": {"context": "a", "continuation": text},
        "idx": choice,
        "label": label,
        "doc_id": document,
    }


def _lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_rows_of_a_document_are_its_choices(tmp_path: Path) -> None:
    content = _lines(_row(0, "b", 1), _row(0, "c", 1, 1), _row(1, "d", ["d"]))
    wanted = (TaskQuestion(("a", "a"), ("b", "c"), 1), TaskQuestion(("a",), ("d",), 0))
    (tmp_path / "plain.jsonl").write_bytes(content)
    assert read_task(str(tmp_path / "plain.jsonl"), None) == Task("plain", wanted)
    assert read_task(f"mine={tmp_path / 'plain.jsonl'}", 1) == Task("mine", wanted[:1])
    with zipfile.ZipFile(tmp_path / "all.whl", "w") as archive:
        archive.writestr("suite/quiz/rc/requests.jsonl.gz", gzip.compress(content))
    packed = f"{tmp_path / 'all.whl'}!suite/quiz/rc/requests.jsonl.gz"
    assert read_task(packed, None) == Task("quiz", wanted)
    (tmp_path / "top.jsonl").write_bytes(_lines({"context": "a", "continuation": "b"}))
    assert read_task(str(tmp_path / "top.jsonl"), None).questions == (TaskQuestion(("a",), ("b",), 0),)


@each(
    "content, clause",
    [
        (b"", "it has no rows"),
        (b"[1]\n", "not an object"),
        (b"{", "it is not JSON"),
        (_lines({"request": {"context": "a"}}), "needs a context and a continuation"),
        (_lines({"context": "a", "continuation": ""}), "needs a context and a continuation"),
        (_lines(_row(0, "b", 2), _row(0, "c", 2, 1)), "its label 2 must be an index from 0 to 1"),
        (_lines(_row(0, "b", True), _row(0, "c", True, 1)), "its label True must be"),
        (_lines(_row(0, "b", "c"), _row(0, "c", "c", 1)), "its label 'c' must be"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content: bytes, clause: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=clause):
        read_task(str(path), None)


@each(
    "path, clause",
    [("none.jsonl", "cannot be read"), ("x.jsonl.gz", "cannot be read"), ("x.zip!y", "cannot be")],
)
def test_a_file_that_cannot_be_opened_is_refused(path: str, clause: str, tmp_path: Path) -> None:
    for name in ("x.jsonl.gz", "x.zip"):
        (tmp_path / name).write_bytes(b"{}\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_task(str(tmp_path / path), None)
