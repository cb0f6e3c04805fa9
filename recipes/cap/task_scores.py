"""Scores of a model on evaluation tasks: accuracy, accuracy by bytes, bits per byte, with bootstrap errors.

Letters: B continuations at once, S tokens, V vocabulary, N questions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.cap.accuracy import split_ids
from recipes.cap.task_files import Task, TaskQuestion

_RESAMPLES = 1000
# Logits that exist at once: 256 MiB in fp32.
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Score:
    """A mean and its standard error, of a bootstrap over the questions."""

    value: float
    error: float


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model on a task.

    Attributes:
        task: Name of the task.
        questions: Number of them.
        accuracy: Share of questions whose right choice has the largest log-likelihood; of tasks with one
            continuation, whose continuation greedy decoding would write.
        accuracy_by_bytes: The same per UTF-8 byte of the choice; None with one continuation.
        bits_per_byte: Of the right continuations.
        chance: Accuracy of guessing; None with one continuation.
        cut: Continuations whose context did not fit and lost its beginning.
    """

    task: str
    questions: int
    accuracy: Score
    accuracy_by_bytes: Score | None
    bits_per_byte: Score
    chance: float | None
    cut: int

    def figures(self) -> dict[str, Any]:
        """Returns the scores as JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class _Scored:
    """A continuation: its log-likelihood, whether greedy decoding writes it, whether its context was cut."""

    nats: float
    greedy: bool
    cut: bool


@torch.no_grad()
def score_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    longest: int | None,
    log: Callable[[str], None] = lambda line: None,
) -> TaskScores:
    """Scores a model on a task.

    Args:
        model: A decoder in evaluation mode.
        tokenizer: Its own.
        task: The questions.
        longest: Tokens of the longest sequence that the model takes; None for no limit.
        log: Takes a line when the task is done.
    """
    pairs = [(c, t) for q in task.questions for c, t in zip(q.contexts, q.choices, strict=True)]
    scored = iter(_score_all(model, tokenizer, pairs, longest))
    by_question = [[next(scored) for _ in question.choices] for question in task.questions]
    found = _scores(task, by_question)
    log(describe(found))
    return found


def describe(scores: TaskScores) -> str:
    """Returns the scores in words."""
    words = [f"accuracy {_words(scores.accuracy)}"]
    if scores.accuracy_by_bytes is not None:
        words.append(f"by bytes {_words(scores.accuracy_by_bytes)} (chance {scores.chance:.3f})")
    words.append(f"{_words(scores.bits_per_byte)} bits per byte")
    cut = f"; {scores.cut} contexts cut" if scores.cut else ""
    return f"{scores.task}: {', '.join(words)}, {scores.questions} questions{cut}"


def _words(score: Score) -> str:
    return f"{score.value:.3f} +- {score.error:.3f}"


def _scores(task: Task, by_question: Sequence[Sequence[_Scored]]) -> TaskScores:
    golds = [question.gold for question in task.questions]
    several = any(len(each) > 1 for each in by_question)
    sizes = [[len(choice.encode()) for choice in question.choices] for question in task.questions]
    nats = np.array([each[gold].nats for each, gold in zip(by_question, golds, strict=True)])
    bytes_N = np.array([each[gold] for each, gold in zip(sizes, golds, strict=True)])
    by_bytes = [
        _best([s.nats / size for s, size in zip(each, lengths, strict=True)])
        for each, lengths in zip(by_question, sizes, strict=True)
    ]
    plain = [_best([s.nats for s in each]) for each in by_question]
    right = [
        each[0].greedy if len(each) == 1 else best == gold
        for each, best, gold in zip(by_question, plain, golds, strict=True)
    ]
    normalised = [best == gold for best, gold in zip(by_bytes, golds, strict=True)]
    ones = np.ones(len(golds))
    return TaskScores(
        task=task.name,
        questions=len(golds),
        accuracy=_ratio(np.array(right, float), ones),
        accuracy_by_bytes=_ratio(np.array(normalised, float), ones) if several else None,
        bits_per_byte=_ratio(-nats / math.log(2), bytes_N),
        chance=_chance(task.questions) if several else None,
        cut=sum(s.cut for each in by_question for s in each),
    )


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _chance(questions: Sequence[TaskQuestion]) -> float:
    return sum(1 / len(question.choices) for question in questions) / len(questions)


def _ratio(over_N: np.ndarray, under_N: np.ndarray) -> Score:
    """Returns the ratio of two sums over the questions, with the deviation of resamples of them."""
    picks_RN = np.random.default_rng(0).integers(len(over_N), size=(_RESAMPLES, len(over_N)))
    values_R = over_N[picks_RN].sum(1) / under_N[picks_RN].sum(1)
    return Score(float(over_N.sum() / under_N.sum()), float(values_R.std(ddof=1)))


def _score_all(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], longest: int | None
) -> list[_Scored]:
    """Scores continuations, those of similar length together."""
    cut_to = [_fit(*split_ids(tokenizer, context, text), longest) for context, text in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(cut_to[i][0]))
    found: dict[int, _Scored] = {}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    while order:
        size = max(1, _LOGITS_AT_ONCE // (vocabulary * len(cut_to[order[0]][0])))
        batch, order = order[:size], order[size:]
        scores = _score_batch(model, [cut_to[i] for i in batch])
        found |= dict(zip(batch, scores, strict=True))
    return [found[i] for i in range(len(pairs))]


def _fit(ids: list[int], start: int, longest: int | None) -> tuple[list[int], int, bool]:
    """Cuts the front of a sequence that is too long."""
    if longest is None or len(ids) <= longest:
        return ids, start, False
    return ids[-longest:], max(1, start - (len(ids) - longest)), True


def _score_batch(model: Any, batch: Sequence[tuple[list[int], int, bool]]) -> list[_Scored]:
    device = model.get_input_embeddings().weight.device
    length = max(len(ids) for ids, _, _ in batch)
    # Tokens behind a sequence change nothing before them.
    ids_BS = torch.tensor([F.pad(torch.tensor(ids), (0, length - len(ids))).tolist() for ids, _, _ in batch])
    ids_BS = ids_BS.to(device)
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    found = []
    for row, (ids, start, cut) in enumerate(batch):
        logits: Tensor = logits_BSV[row, start - 1 : len(ids) - 1].float()
        wanted = ids_BS[row, start : len(ids)]
        nats = logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum()
        found.append(_Scored(float(nats), bool((logits.argmax(-1) == wanted).all()), cut))
    return found
