"""Accuracy on local files: perplexity of text, and multiple choice by length-normalised log-likelihood.

Letters: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import Mistake
from recipes.cap.json_lines import read_json_lines


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        text: The question.
        choices: Answers to choose from.
        answer: Index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, where: str = "--choices") -> tuple[list[Question], list[Mistake]]:
    """Returns the questions of a file of JSON lines, and every mistake in it.

    A line is ``{"question": ..., "choices": [...], "answer": ...}``; the answer is an index from 0, or one of
    the choices to the letter.
    """
    remedy = 'Write {"question": "...", "choices": ["...", "..."], "answer": 0}.'
    return read_json_lines(path, where, _question, "question", remedy)


def _question(row: dict[str, Any]) -> Question | str:
    """Returns the question of a line, or the rule that it breaks."""
    if not isinstance(row.get("question"), str):
        return "it needs a question, a text"
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) for choice in choices):
        return "it needs two choices or more, texts that are not empty"
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f"its answer must be an index from 0 to {len(choices) - 1}, or one of the choices"
    return Question(row["question"], tuple(choices), answer)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def share_right(accuracy: Mapping[str, Any]) -> float | None:
    """Returns the share of right choices, else of right answers; None where neither was asked for."""
    asked = accuracy["choices"] or accuracy.get("answers")
    return None if asked is None else float(asked["accuracy"])


@torch.no_grad()
def log_likelihoods(model: Any, ids_S: Tensor) -> Tensor:
    """Returns ``[S - 1]`` log-probability of every token but the first, in fp32."""
    logits_SV = model(input_ids=ids_S[None], use_cache=False).logits[0, :-1].float()
    return logits_SV.log_softmax(-1).gather(1, ids_S[1:, None])[:, 0]


def perplexity(model: Any, tokenizer: Any, ids_BS: Tensor) -> dict[str, Any]:
    """Measures perplexity per token, and bits per byte, which compare between tokenizers.

    Args:
        model: A decoder.
        tokenizer: Its own, to count the bytes that the tokens stand for.
        ids_BS: Text; every sample starts without context, and its first token is not scored.
    """
    total, count, size = 0.0, 0, 0
    for ids_S in ids_BS:
        scores = log_likelihoods(model, ids_S)
        total -= float(scores.double().sum())
        count += scores.numel()
        size += len(tokenizer.decode(ids_S[1:].tolist()).encode())
    mean = total / count
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "nats_per_token": mean,
        "bits_per_byte": total / math.log(2) / size if size else None,
        "tokens": count,
        "samples": len(ids_BS),
    }


def multiple_choice(
    model: Any, tokenizer: Any, questions: Iterable[Question], device: torch.device, longest: int | None
) -> dict[str, Any]:
    """Measures the share of questions whose right choice has the highest log-likelihood per byte.

    Args:
        model: A decoder.
        tokenizer: Its own.
        questions: See `read_questions`. A choice follows its question after a space.
        device: Device of the model.
        longest: Tokens of the longest sequence it takes; None for no limit. A longer question is cut from
            the front, and counted.
    """
    right, total, cut, chance = 0, 0, 0, 0.0
    for question in questions:
        scores = []
        for choice in question.choices:
            ids, start = split_ids(tokenizer, question.text, f" {choice}")
            if longest is not None and len(ids) > longest:
                start = max(1, start - (len(ids) - longest))
                ids, cut = ids[-longest:], cut + 1
            scored = log_likelihoods(model, torch.tensor(ids, device=device))[start - 1 :]
            scores.append(float(scored.double().sum()) / len(choice.encode()))
        right += max(range(len(scores)), key=lambda i: scores[i]) == question.answer
        chance += 1 / len(question.choices)
        total += 1
    share = right / total
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / total),
        "chance": chance / total,
        "questions": total,
        "cut": cut,
        "normalised_by": "UTF-8 bytes of the choice",
    }


def split_ids(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Returns the ids of both, and the start of the continuation: the first token that it changes.

    A token may span the border; it then belongs to the continuation. The first token has no context and is
    never scored.
    """
    alone = tokenizer(context)["input_ids"]
    both = tokenizer(context + continuation)["input_ids"]
    start = 0
    while start < min(len(alone), len(both)) and alone[start] == both[start]:
        start += 1
    return both, max(1, start)
