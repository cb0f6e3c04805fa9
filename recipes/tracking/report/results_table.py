"""Results of a run: the models side by side, a headline, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.tracking.report import formats
from recipes.tracking.report.formats import NOT_MEASURED, number
from recipes.tracking.results import LABELS

MODELS = ("dense", "cpt", "moe")
# Models of a run that trains a mixture on.
_OF_A_MIXTURE = ("mixture", "moe")
_STARTS = ("mixture", "dense")
_SAME_TOKENS = 0.005  # budgets that differ by less count as equal


@dataclass(frozen=True)
class Result:
    """One model of a run. What was not measured is None.

    Attributes:
        model: ``dense``, ``cpt``, ``moe``, or ``mixture`` for one that is trained on.
        label: Its name in tables and figures.
        val_loss: Validation loss, nats per token.
        tokens: Trained after the dense checkpoint.
        total_params: Parameters.
        active_params: Parameters that work on a token.
        flops_per_token_forward: FLOPs of a forward pass.
        flops_per_token_train: FLOPs of a training step.
        tokens_per_s: Training throughput, all ranks together.
    """

    model: str
    label: str
    val_loss: float | None = None
    tokens: float | None = None
    total_params: float | None = None
    active_params: float | None = None
    flops_per_token_forward: float | None = None
    flops_per_token_train: float | None = None
    tokens_per_s: float | None = None


def label_of(model: str) -> str:
    """Returns the name of a model or stage where the summary gives none."""
    return LABELS.get(model, model)


def read_results(summary: Mapping[str, Any]) -> list[Result]:
    """Returns the models of ``summary["results"]``, in the order of `LABELS`, then others."""
    entries = summary.get("results")
    results = [_result(e) for e in entries if isinstance(e, Mapping)] if isinstance(entries, list) else []
    order = list(LABELS)
    return sorted(results, key=lambda r: order.index(r.model) if r.model in order else len(order))


def find(results: Sequence[Result], model: str) -> Result:
    """Returns the result of a model; one without figures when it is missing."""
    return next((r for r in results if r.model == model), Result(model, label_of(model)))


def start_of(results: Sequence[Result]) -> Result:
    """Returns the model that a run began with: a mixture that it trains on, or the dense one."""
    return find(results, "mixture" if _is_continued(results) else "dense")


def _is_continued(results: Sequence[Result]) -> bool:
    return any(result.model == "mixture" for result in results)


def header(results: Sequence[Result]) -> list[str]:
    """Returns the columns of the results, with units."""
    return [
        "model",
        "val. loss (nats/token)",
        "vs. start" if _is_continued(results) else "vs. dense",
        "tokens trained",
        "total params",
        "active params",
        "forward GFLOPs/token",
        "train GFLOPs/token",
        "tokens/s",
    ]


def cells(results: Sequence[Result]) -> list[list[str]]:
    """Returns the results as text, a row for each model, in the columns of `header`."""
    start = start_of(results).val_loss
    return [_row(result, start) for result in results]


def results_table(summary: Mapping[str, Any]) -> str:
    """Returns the results as aligned plain text, for the end of a run.

    Args:
        summary: Content of ``summary.json``; anything may be missing.
    """
    results = read_results(summary)
    rows = cells(results)
    if not rows:
        return f"results: {NOT_MEASURED}"
    # The unit goes under the name, so that eight columns fit a terminal.
    heads = [_two_lines(name) for name in header(results)]
    lines = [[head[0] for head in heads], [head[1] for head in heads], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [_aligned(line, widths) for line in lines]
    text.insert(2, "-" * len(text[0]))
    notes = caveats(results)
    return "\n".join(line.rstrip() for line in [*text, *notes])


def headline(results: Sequence[Result]) -> str:
    """Describes the run in one sentence with its figures."""
    first, cpt, moe = start_of(results), find(results, "cpt"), find(results, "moe")
    if not results:
        return "This run has left no results: it was stopped before its summary was written."
    start = f"validation loss {formats.loss(first.val_loss)}" if first.val_loss is not None else ""
    size = f"{formats.count(first.total_params)} parameters" if first.total_params is not None else ""
    about = ", ".join(part for part in (size, start) if part)
    continued = _is_continued(results)
    text = f"The {'mixture' if continued else 'dense model'}{f' ({about})' if about else ''}"
    if moe not in results:
        return f"{text} has no results of an MoE here: the run ended before they were written."
    text += " was trained on" if continued else " became an MoE"
    if moe.total_params is not None and not continued:
        text += f" of {formats.count(moe.total_params)} parameters"
    if moe.active_params is not None:
        text += f", {formats.count(moe.active_params)} active for a token"
    if moe.val_loss is None:
        return f"{text}; its validation loss was {NOT_MEASURED}."
    after = f" after {formats.count(moe.tokens)} tokens" if moe.tokens is not None else ""
    text += f". Its validation loss{after} is {formats.loss(moe.val_loss)}"
    if continued:
        return f"{text}."
    if cpt.val_loss is None:
        return f"{text}; the dense model was {NOT_MEASURED} at that budget."
    budget = f"{formats.count(cpt.tokens)} tokens" if different_tokens(results) else "the same tokens"
    return f"{text}, that of the dense model trained on {budget} {formats.loss(cpt.val_loss)}."


def different_tokens(results: Sequence[Result]) -> bool:
    """Returns True if the continued dense model and the MoE were trained on different numbers of tokens."""
    cpt, moe = find(results, "cpt").tokens, find(results, "moe").tokens
    return cpt is not None and moe is not None and abs(cpt - moe) > _SAME_TOKENS * max(cpt, moe)


def caveats(results: Sequence[Result]) -> list[str]:
    """Returns remarks on the table."""
    cpt, moe = find(results, "cpt"), find(results, "moe")
    if not different_tokens(results):
        return []
    budgets = f"{formats.count(cpt.tokens)} and {formats.count(moe.tokens)}"
    return [f"Note: {cpt.label} and {moe.label} were trained on different numbers of tokens, {budgets}."]


def missing(results: Sequence[Result]) -> list[str]:
    """Lists the models and figures that a complete run has and this one lacks."""
    models = _OF_A_MIXTURE if _is_continued(results) else MODELS
    gone = [f"{label_of(m)}: every figure" for m in models if all(r.model != m for r in results)]
    for result in results:
        names = {"validation loss": result.val_loss, "parameters": result.total_params}
        gone += [f"{result.label}: {name}" for name, value in names.items() if value is None]
    return gone


def _result(entry: Mapping[str, Any]) -> Result:
    model = str(entry.get("model", "?"))
    names = [name for name in Result.__dataclass_fields__ if name not in ("model", "label")]
    figures = {name: number(entry.get(name)) for name in names}
    return Result(model, str(entry.get("label") or label_of(model)), **figures)


def _row(result: Result, start: float | None) -> list[str]:
    change = None if result.val_loss is None or start is None else result.val_loss - start
    return [
        result.label,
        formats.loss(result.val_loss),
        "-" if result.model in _STARTS else formats.difference(change),
        formats.count(result.tokens),
        formats.count(result.total_params),
        formats.count(result.active_params),
        formats.giga(result.flops_per_token_forward),
        formats.giga(result.flops_per_token_train),
        "-"
        if result.model in _STARTS and result.tokens_per_s is None
        else formats.count(result.tokens_per_s),
    ]


def _two_lines(name: str) -> tuple[str, str]:
    first, _, second = name.partition(" ")
    if name.startswith("val. loss"):
        first, second = "val. loss", "(nats/token)"
    return (first, second) if second else ("", first)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Aligns the first column to the left, figures to the right."""
    first, *figures = [(text, width) for text, width in zip(line, widths, strict=True)]
    return "  ".join([first[0].ljust(first[1])] + [text.rjust(width) for text, width in figures])
