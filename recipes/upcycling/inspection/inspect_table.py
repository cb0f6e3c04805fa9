"""Figures of a mixture as a table for the terminal, and the findings worth knowing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.tracking.report import formats

Figures = Mapping[str, Any]
HEAD = (
    *("layer", "MaxVio", "load entropy", "token entropy", "dead", "twins", "most alike", "near ties"),
    *("from mean", "from dense", "favourite"),
)
_ABSENT = "-"
# Shares of near ties from which serving in bf16 may choose other experts often enough to matter; loads of one
# expert, over the mean.
_TIES, _BUSY = 0.02, 2.0
_NAMED = 6


def table_rows(figures: Figures) -> list[list[str]]:
    """Returns the cells of every layer."""
    return [_row(layer) for layer in figures["layers"]]


def text_report(figures: Figures) -> str:
    """Returns the table and the findings for the terminal."""
    head = f"{figures['family']}, router {figures['router']}, {figures['tokens']:,} tokens"
    lines = [head, "", formats.aligned(HEAD, table_rows(figures)), ""]
    return "\n".join(lines + [f"- {finding}" for finding in findings(figures)])


def findings(figures: Figures) -> list[str]:
    """Returns the sentences worth knowing: dead experts, twins, near ties, overload."""
    tokens, layers = figures["tokens"], figures["layers"]
    found = [line for layer in layers for line in _of_layer(layer, tokens)]
    return found or ["no dead experts, no twins, no overload, and few near ties"]


def _of_layer(layer: Figures, tokens: int) -> list[str]:
    lines, name, pairs = [], f"layer {layer['layer']}", layer["experts"] * (layer["experts"] - 1) // 2
    if dead := layer["dead"]:
        bound = formats.share(min(1.0, 3 / tokens))
        lines.append(
            f"{name}: {len(dead)} of {layer['experts']} experts dead: {_some(dead)} (each takes fewer than "
            f"{bound} of tokens, at 95 %)"
        )
    if twins := layer["twins"]:
        lines.append(
            f"{name}: {len(twins)} of {pairs} pairs are twins: {_some([f'{i}+{j}' for i, j in twins])}"
        )
    if layer["near_ties"] is not None and layer["near_ties"] >= _TIES:
        lines.append(
            f"{name}: {formats.share(layer['near_ties'])} of tokens are near ties, which bf16 rounding of "
            "the router's logits can decide otherwise"
        )
    if layer["max_vio"] >= _BUSY:
        expert = max(range(layer["experts"]), key=lambda e: layer["load"][e])
        lines.append(f"{name}: expert {expert} takes {1 + layer['max_vio']:.1f} times its fair share")
    return lines


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def _row(layer: Figures) -> list[str]:
    E = layer["experts"]
    alike = [row[j] for i, row in enumerate(layer["output_cka"]) for j in range(i + 1, E)]
    return [
        str(layer["layer"]),
        f"{layer['max_vio']:.2f}",
        f"{layer['load_entropy']:.3f}",
        _cell(layer["token_entropy"], "{:.3f}"),
        str(len(layer["dead"])),
        str(len(layer["twins"])),
        _cell(max((value for value in alike if value is not None), default=None), "{:.3f}"),
        _cell(layer["near_ties"], "{:.2%}"),
        _mean(layer["distance_from_mean"]),
        _mean(layer["distance_from_dense"]),
        _cell(layer["vocabulary_specialisation"], "{:.1%}"),
    ]


def _cell(value: float | None, pattern: str) -> str:
    return _ABSENT if value is None else pattern.format(value)


def _mean(values: Sequence[float | None] | None) -> str:
    known = [value for value in values or [] if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else _ABSENT
