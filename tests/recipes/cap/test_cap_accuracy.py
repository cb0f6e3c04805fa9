"""Accuracy: perplexity against a slow loop, multiple choice by hand, mistakes in the file of questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.cap.accuracy import Question, log_likelihoods, multiple_choice, perplexity, read_questions
from recipes.data.tokenizer import load_tokenizer
from tests.conftest import random_model
from tests.recipes.cap.cap_systems import CPU, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def test_perplexity_against_a_slow_loop(tokenizer_folder: Path) -> None:
    model, tokenizer = random_model("llama"), load_tokenizer(tokenizer_folder, append_eos=False)
    ids_BS = some_ids(3, 9)
    total, size = 0.0, 0
    with torch.no_grad():
        for row in ids_BS.tolist():
            for place in range(1, len(row)):  # every token from those before it, each in a pass of its own
                logits = model(input_ids=torch.tensor([row[:place]])).logits[0, -1].double()
                total -= float(logits[row[place]] - logits.logsumexp(0))
            size += len(tokenizer.decode(row[1:]).encode())
    found = perplexity(model, tokenizer, ids_BS)
    assert (found["tokens"], found["samples"]) == (24, 3)
    assert found["nats_per_token"] == pytest.approx(total / 24, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / 24), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


class Letters:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


class Table:
    """A model whose next byte depends on nothing: log-probabilities that a test can add up."""

    def __init__(self, **chances: float) -> None:
        rest = (1 - sum(chances.values())) / (256 - len(chances))
        self.log_V = torch.full((256,), rest).log()
        for letter, chance in chances.items():
            self.log_V[ord(letter)] = math.log(chance)
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.lengths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.log_V.expand(1, input_ids.shape[1], 256))


def test_choices_by_hand() -> None:
    model = Table(a=0.5, b=0.25)
    questions = [
        Question("q", ("a", "b"), 0),
        Question("q", ("a", "bb"), 1),
        Question("q", ("ab", "zz", "b"), 0),
    ]
    found = multiple_choice(model, Letters(), questions, CPU, None)
    # a choice follows a space, which is scored as the same for all and shared among its bytes:
    #   1: a before b                              right
    #   2: (space + ln .5) / 1 against (space + 2 ln .25) / 2: the longer shares the space's cost
    space = float(model.log_V[ord(" ")])
    second = (space + math.log(0.5)) < (space + 2 * math.log(0.25)) / 2
    #   3: ab: (space + ln .125) / 2, against zz far below and b: space + ln .25
    third = (space + math.log(0.125)) / 2 > space + math.log(0.25)
    right = 1 + second + third
    assert found["accuracy"] == right / 3 and (found["questions"], found["cut"]) == (3, 0)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    share = right / 3
    assert found["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_long_questions_lose_their_beginning_and_are_counted() -> None:
    model = Table(a=0.5)
    found = multiple_choice(model, Letters(), [Question("0123456789", ("a", "b"), 0)], CPU, 6)
    assert model.lengths == [6, 6] and (found["accuracy"], found["cut"]) == (1.0, 2)
    # a choice that alone is longer than the model: its own beginning goes
    found = multiple_choice(model, Letters(), [Question("0", ("a" * 9, "b" * 9), 0)], CPU, 4)
    assert found["accuracy"] == 1.0


def test_log_likelihoods_skip_the_first_token() -> None:
    assert log_likelihoods(Table(a=0.5), torch.tensor(list(b"baa"))).tolist() == pytest.approx(
        [math.log(0.5)] * 2
    )


def test_a_good_file(tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0},
        {"question": "sky", "choices": ["green", "blue"], "answer": "blue"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    questions, mistakes = read_questions(path)
    assert mistakes == [] and [question.answer for question in questions] == [0, 1]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is not an object"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "it needs a question"),
        ('{"question": "", "choices": ["a"], "answer": 0}', "two choices or more"),
        ('{"question": "", "choices": ["a", ""], "answer": 0}', "two choices or more"),
        ('{"question": "", "choices": ["a", "b"], "answer": 2}', "an index from 0 to 1"),
        ('{"question": "", "choices": ["a", "b"], "answer": true}', "an index from 0 to 1"),
        ('{"question": "", "choices": ["a", "b"], "answer": "c"}', "an index from 0 to 1"),
    ],
)
def test_every_mistake_is_named_by_its_line(tmp_path: Path, row: str, rule: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{row}\n{row}\n")
    questions, mistakes = read_questions(path)
    assert questions == [] and [m.path for m in mistakes] == [f"--choices {path}:{n}" for n in (1, 2)]
    assert rule in mistakes[0].rule and "question" in mistakes[0].remedy


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert "cannot be read" in read_questions(tmp_path / "none")[1][0].rule
    (tmp_path / "empty").write_text("\n")
    assert "holds no question" in read_questions(tmp_path / "empty")[1][0].rule
