"""Accuracy on local prompts whose answers the model writes itself, greedily."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch

from moe.errors import Mistake
from recipes.cap.json_lines import read_json_lines
from recipes.data.tokenizer import spelled

RULE = (
    "first line written, equal to an answer without case, articles, punctuation and further spaces; where an "
    "answer is a number, the last number written"
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_REMEDY = 'Write {"prompt": "...", "answer": "..."}, or a list of answers.'


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answers that count as right."""

    text: str
    answers: tuple[str, ...]


def read_prompts(path: Path, where: str = "--answers") -> tuple[list[Prompt], list[Mistake]]:
    """Returns the prompts of a file of JSON lines ``{"prompt": ..., "answer": ...}``, and every mistake."""
    return read_json_lines(path, where, _prompt, "prompt", _REMEDY)


def _prompt(row: dict[str, Any]) -> Prompt | str:
    """Returns the prompt of a line, or the rule that it breaks."""
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        return "it needs a prompt, a text that is not empty"
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(one, str) and normalised(one) for one in answers):
        return "it needs an answer, or a list of them, texts with a letter or digit"
    return Prompt(row["prompt"], tuple(answers))


def normalised(text: str) -> str:
    """Normalises text: lower case, without punctuation, articles and repeated spaces.

    Source: Rajpurkar et al., "SQuAD", arXiv:1606.05250, section 6.1.
    """
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def is_right(written: str, answers: Iterable[str]) -> bool:
    """Returns True if the text of a model counts as one of the answers, by `RULE`."""
    line = next((line for line in written.splitlines() if line.strip()), "")
    last = _last_number(written)
    for answer in answers:
        wanted = _number(answer)
        if wanted == last if wanted is not None else normalised(line) == normalised(answer):
            return True
    return False


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return _number(found[-1]) if found else None


@torch.no_grad()
def written_answers(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    device: torch.device,
    limits: tuple[int, int | None],
) -> dict[str, Any]:
    """Measures the share of prompts answered correctly, each decoded greedily on its own.

    Args:
        model: A decoder of transformers, or one of Graft's.
        tokenizer: Its own.
        prompts: See `read_prompts`.
        device: Device of the model.
        limits: New tokens at most, and tokens of the longest sequence that the model takes; None for no
            limit. A longer prompt is cut from the front, and counted.
    """
    new, longest = limits
    right, cut, samples = 0, 0, []
    for prompt in prompts:
        ids = tokenizer(prompt.text)["input_ids"]
        if longest is not None and len(ids) > longest - new:
            ids, cut = ids[-(longest - new) :], cut + 1
        given = torch.tensor([ids], device=device)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, use_cache=True
        )
        text = spelled(tokenizer, out[0, len(ids) :].tolist(), skip_special_tokens=True)
        correct = is_right(text, prompt.answers)
        right += correct
        samples.append({"prompt": prompt.text[-200:], "written": text, "right": correct})
    total = len(samples)
    share = right / total
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / total),
        "prompts": total,
        "cut": cut,
        "new_tokens": new,
        "rule": RULE,
        "samples": samples,
    }
