"""Answers that the model writes: what counts as right, against transformers' own generation, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.cap.accuracy import share_right
from recipes.cap.generation import Prompt, is_right, normalised, read_prompts, written_answers
from recipes.data.tokenizer import load_tokenizer
from tests.conftest import random_model
from tests.recipes.cap.cap_systems import CPU

pytestmark = pytest.mark.usefixtures("one_thread")


def test_normalised_by_hand() -> None:
    assert normalised("  The Cat,  sat. on a MAT!") == "cat sat on mat"


@pytest.mark.parametrize(
    ("written", "answers", "right"),
    [
        (" Paris.\nAnd then", ("paris",), True),
        ("\n the Eiffel tower", ("Tower", "Eiffel Tower"), True),
        ("Paris is it", ("Paris",), False),
        ("", ("Paris",), False),
        # A number counts wherever the last one stands, however it is written.
        ("4 and 8 make\n1,200.0 in all", ("1200",), True),
        ("-3", ("3",), False),
        ("12 and 13", ("12",), False),
        # Words around a number are no number.
        ("7 dwarfs", ("seven dwarfs", "7 dwarfs"), True),
    ],
)
def test_what_is_right(written: str, answers: tuple[str, ...], right: bool) -> None:
    assert is_right(written, answers) is right


def test_answers_are_what_greedy_decoding_writes(tokenizer_folder: Path) -> None:
    model, tokenizer = random_model("llama"), load_tokenizer(tokenizer_folder, append_eos=False)
    texts = ["the quick brown fox", "def f(x):"]
    wanted = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        start = len(ids)
        with torch.no_grad():  # every token in a pass of its own, without a cache
            while len(ids) < start + 5 and (len(ids) == start or ids[-1] != 0):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    prompts = [Prompt(texts[0], ("no such",)), Prompt(texts[1], ("no such",))]
    found = written_answers(model, tokenizer, prompts, CPU, (5, None))
    assert [sample["written"] for sample in found["samples"]] == wanted
    assert (found["accuracy"], found["prompts"], found["cut"]) == (0.0, 2, 0)
    told = written_answers(model, tokenizer, prompts, CPU, (5, 8))
    assert told["cut"] == sum(len(tokenizer(text)["input_ids"]) > 3 for text in texts) > 0


def test_choices_come_before_answers() -> None:
    assert share_right({"choices": None, "answers": {"accuracy": 0.5}}) == 0.5
    assert share_right({"choices": {"accuracy": 0.25}, "answers": {"accuracy": 0.5}}) == 0.25
    assert share_right({"choices": None}) is None


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "it is not JSON"),
        ('{"prompt": ""}', "it needs a prompt"),
        ('{"prompt": "a"}', "it needs an answer"),
        ('{"prompt": "a", "answer": []}', "it needs an answer"),
        ('{"prompt": "a", "answer": ["b", "."]}', "it needs an answer"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "2+2=", "answer": "4"}) + "\n\n" + line + "\n")
    prompts, (mistake,) = read_prompts(path)
    assert len(prompts) == 1 and mistake.path.endswith("answers.jsonl:3") and mistake.rule.startswith(rule)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    assert read_prompts(tmp_path / "empty")[1][0].rule == "it holds no prompt"
    assert "cannot be read" in read_prompts(tmp_path / "none")[1][0].rule
