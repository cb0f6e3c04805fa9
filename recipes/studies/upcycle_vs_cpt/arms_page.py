"""Grid as tables for the terminal, JSON, a picture, one page, and tables of runs for `tools.fit_laws`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path

from recipes.runtime.atomic import atomic_write_text
from recipes.studies.study_page import Spread, cell, write_study_files
from recipes.studies.upcycle_vs_cpt.collect_arms import READINGS, Cell, Found, Reading
from recipes.tracking.report import formats

_HEAD = ("dense steps", "model", "tokens after", "train TFLOP after", "val. loss", "above upcycled", "seeds")
_COSTS_HEAD = ("decode step", "batch", "KB/token", "of it weights", "MFLOPs/token", "distinct experts")
_COLUMNS = (
    "loss", "tokens", "dense_tokens", "params", "active_params", "dense_params", "num_experts", "top_k",
    "granularity", "seed", "train_flops",
)  # fmt: skip
NOTES = (
    "Mean over seeds, with the sample standard deviation behind +-. 'above upcycled' is taken seed by seed: "
    "above 0 upcycling is ahead. Every loss is taken at the end of a run, whose learning rate has decayed.",
    "FLOPs are forward and backward by the 'exact' convention of docs/accounting.md. 'Dense counted' gives "
    "the MoE from scratch the FLOPs of the dense pre-training on top; 'not counted' takes the dense "
    "model as given, and is then at equal tokens as well.",
    "Serving: 16 bits an element, cache included. Distinct experts are expected under uniform routing: an "
    "upper bound for more than one sequence.",
)


def loss_rows(found: Found) -> list[list[str]]:
    """Returns a row for every dense length and reading; empty where nothing was measured."""
    rows = []
    for length in found.lengths:
        for name, (label, arm) in READINGS.items():
            loss, at = found.loss(length, name), found.reading(length, name)
            if loss is None or at is None:
                rows.append([str(length), label, "", "", "", "", "0"])
                continue
            flops = "" if arm == "dense" else f"{at.flops / 1e12:.3f}"
            behind = "" if name == "moe" else cell(found.behind(length, name), sign="+")
            count = str(len(loss.values))
            rows.append([str(length), label, formats.count(at.tokens), flops, cell(loss), behind, count])
    return rows


def cost_rows(found: Found) -> list[list[str]]:
    """Returns a row for every model and batch."""
    rows = []
    for model, label in (("dense", "dense, continued"), ("moe", "upcycled, scratch")):
        for entry in found.cells[0].serving[model] or []:
            distinct = entry["distinct_experts"]
            rows.append(
                [
                    label,
                    str(entry["batch"]),
                    f"{entry['bytes_per_token'] / 1e3:,.1f}",
                    f"{entry['weight_bytes_per_token'] / 1e3:,.1f}",
                    f"{entry['flops_per_token'] / 1e6:.3f}",
                    "" if distinct is None else f"{distinct:.2f}",
                ]
            )
    return rows


def text_tables(found: Found) -> str:
    """Returns everything that the terminal shows."""
    parts = [
        formats.aligned(_HEAD, loss_rows(found), left=2),
        formats.aligned(_COSTS_HEAD, cost_rows(found), left=2),
    ]
    if found.missing:
        parts.append(f"not there: {', '.join(found.missing)}")
    return "\n\n".join([*parts, "\n".join(NOTES)])


def write_page(folder: Path, found: Found, description: str) -> Path:
    """Writes ``grid.json``, ``grid.png``, ``grid.html`` and ``runs-*.csv``; returns the page's path."""
    from recipes.studies.upcycle_vs_cpt.arms_figure import draw
    from recipes.tracking.report.page import Section, draw_picture

    for arm in ("cpt", "moe", "scratch"):
        atomic_write_text(folder / f"runs-{arm}.csv", run_table(found, arm))
    text = "Loss over tokens, training FLOPs, dense length and serving cost"
    introduction = [f"Options of every run: {description}"]
    if found.missing:
        introduction.append(f"Not there: {', '.join(found.missing)}")
    sections = [
        Section(picture=draw_picture(lambda theme: draw(found, theme), text, folder / "grid.png")),
        Section("Losses", head=_HEAD, rows=loss_rows(found), absent=""),
        Section("Serving", head=_COSTS_HEAD, rows=cost_rows(found), notes=NOTES, absent=""),
    ]
    title = "Upcycled, dense continued, MoE from scratch"
    return write_study_files(folder, "grid", figures(found, description), title, introduction, sections)


def figures(found: Found, description: str) -> dict[str, object]:
    """Returns the figures for programs."""
    readings = [
        {
            "length": length,
            "reading": name,
            "label": label,
            **_plain(found.reading(length, name)),
            "sunk_flops": found.of(length)[0].sunk_flops,
            "loss": _plain(found.loss(length, name)),
            "above_upcycled": _plain(found.behind(length, name)),
        }
        for length in found.lengths
        for name, (label, _) in READINGS.items()
    ]
    return {
        "options": description,
        "missing": found.missing,
        "readings": readings,
        "serving": found.cells[0].serving,
        "cells": [asdict(cell) for cell in found.cells],
    }


def _plain(value: Spread | Reading | None) -> dict[str, object]:
    return {} if value is None else asdict(value)


def run_table(found: Found, arm: str) -> str:
    """Returns the finished runs of an arm as a table that `tools.fit_laws` reads.

    The continued dense model is a dense run: its tokens are those before and after. A run from scratch has
    no tokens before.
    """
    stream = io.StringIO()
    stream.write("# A law needs several model sizes, and this is one: append the tables of others.\n")
    columns = [name for name in _COLUMNS if arm == "moe" or not name.startswith("dense_")]
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    # A run from scratch may serve several dense lengths.
    lines = [line for cell in found.cells for line in _lines(cell, arm)]
    writer.writerows({tuple(line.values()): line for line in lines}.values())
    return stream.getvalue()


def _lines(cell: Cell, arm: str) -> list[dict[str, object]]:
    sizes = dict(cell.sizes)
    before = 0 if arm == "scratch" else cell.dense_tokens
    if arm == "cpt":
        dense = sizes["dense_params"]
        sizes |= {"params": dense, "active_params": dense, "num_experts": 1, "top_k": 1}
    return [
        {
            "loss": at.loss,
            "tokens": at.tokens + before if arm == "cpt" else at.tokens,
            "dense_tokens": before,
            **sizes,
            "granularity": 1,
            "seed": cell.seed,
            "train_flops": at.flops,
        }
        for name, at in cell.readings.items()
        if READINGS[name][1] == arm
    ]
