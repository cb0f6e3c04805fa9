"""Page of a mixture that opens offline: findings, pictures, and what each expert takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.tracking.report import formats
from recipes.tracking.report.page import Section, draw_picture, write_study
from recipes.upcycling.inspection.inspect_pictures import likeness_picture, load_picture, margin_picture
from recipes.upcycling.inspection.inspect_table import HEAD, findings, table_rows

Figures = Mapping[str, Any]
PAGE_NAME = "inspect.html"
_NOTE = (
    "Entropies are over ln E. Most alike: the largest linear CKA of two experts. From mean, from dense: mean "
    "distance of the experts' weights, over the norm of what they are compared with. Favourite: mean share "
    "of a token's occurrences that go to its favourite expert. docs/inspect.md says when to worry."
)


def write_page(folder: Path, figures: Figures) -> Path:
    """Writes ``inspect.html`` and its pictures; returns the page's path.

    Raises:
        DiskError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = most_alike_layer(figures)
    load = draw_picture(
        lambda theme: load_picture(figures, theme), "Load by layer and expert", folder / "load.png"
    )
    text = f"Likeness of the experts of layer {chosen['layer']}"
    alike = draw_picture(lambda theme: likeness_picture(chosen, theme), text, folder / "likeness.png")
    text = "Margins of the router, and near ties, by layer"
    margin = draw_picture(lambda theme: margin_picture(figures, theme), text, folder / "margins.png")
    sections = [
        Section("Findings", bullets=findings(figures)),
        Section("Does every expert get its share?", picture=load),
        Section(f"Are experts alike? Layer {chosen['layer']}, the most alike", picture=alike),
        Section("Does rounding change the choice?", picture=margin) if margin else Section(),
        Section("Table", head=HEAD, rows=table_rows(figures), notes=[_NOTE], absent="-"),
        Section(
            f"What experts take, layer {chosen['layer']}",
            head=("expert", "load", "REAP", "tokens that it takes above its share (taken / seen)"),
            rows=_experts(chosen),
            absent="-",
        ),
    ]
    introduction = [f"{figures['model']}: {figures['family']}, {figures['tokens']:,} tokens of text."]
    return write_study(folder / PAGE_NAME, "Inside a mixture", introduction, sections)


def most_alike_layer(figures: Figures) -> Figures:
    """Returns the layer whose experts are the most alike on average, by outputs."""

    def mean(layer: Figures) -> float:
        known = [
            value
            for i, row in enumerate(layer["output_cka"])
            for j, value in enumerate(row)
            if i < j and value is not None
        ]
        return sum(known) / len(known) if known else -1.0

    chosen: Figures = max(figures["layers"], key=mean)
    return chosen


def _experts(layer: Figures) -> list[list[str]]:
    rows = []
    for expert, listed in enumerate(layer["favourite_tokens"]):
        words = ", ".join(f"{token['text']!r} {token['routed']}/{token['occurrences']}" for token in listed)
        reap = layer["importance_reap"][expert]
        rows.append([str(expert), formats.share(layer["load"][expert]), formats.small(reap), words or "-"])
    return rows
