"""What the training used of the hardware, and what the run's time went into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.tracking.report import formats, html
from recipes.tracking.report.formats import NOT_MEASURED
from recipes.tracking.report.results_table import find, read_results
from recipes.tracking.report.run_record import RunRecord, section
from recipes.tracking.training_figures import summarise_stage

_HEAD = ["training of", "tokens/s", "MFU", "S-MFU", "S-MBU", "peak memory of a rank", "J/token"]
_NAMES = {
    "mfu": "MFU",
    "s_mfu": "S-MFU",
    "s_mbu": "S-MBU",
    "memory_bytes": "memory",
    "energy_j": "energy",
}
_TIMES = (
    ("steps_s", "optimizer steps that count"),
    ("lost_steps_s", "steps that were lost and done again"),
    ("evaluation_s", "evaluation"),
    ("saving_s", "saving checkpoints"),
    ("other_s", "start-up, data, surgery, export"),
    ("down_s", "between the processes of the run"),
)
_NOTE = (
    "Over all steps of a model, as ratios of sums. MFU counts the experts a token that the router is set to, "
    "S-MFU those that computed; S-MBU the bytes that a step must move at least, with the experts that its "
    "micro-batches touched, without activations (docs/accounting.md)."
)


def hardware(record: RunRecord) -> list[str]:
    """A row a leg, then where the time went; nothing for a run that has measured none of it."""
    stages = section(record.summary, "training")
    rows = {stage: summarise_stage(rows) for stage, rows in record.stages.items()}
    shown = {
        stage: figures for stage, figures in rows.items() if stage in stages or figures["s_mbu"] is not None
    }
    goodput = record.section("goodput")
    if not shown and not goodput:
        return []
    pieces = [html.heading("Use of the hardware")]
    if shown:
        table = [_row(record, stage, figures) for stage, figures in shown.items()]
        pieces += [html.paragraph(_NOTE, "note"), html.table(_HEAD, table, NOT_MEASURED)]
    reasons = _reasons(stages)
    if reasons:
        pieces += [html.paragraph("Not measured:", "note"), html.bullets(reasons)]
    return [*pieces, html.facts([*_peaks(record), *_energy(record), *_goodput(goodput)], NOT_MEASURED)]


def _row(record: RunRecord, stage: str, figures: Mapping[str, float | None]) -> list[str]:
    joules = figures["joules_per_token"]
    return [
        find(read_results(record.summary), stage).label,
        formats.count(figures["tokens_per_s"]),
        *(formats.share(figures[name]) for name in ("mfu", "s_mfu", "s_mbu")),
        formats.size(figures["memory_bytes"]),
        formats.small(joules),
    ]


def _reasons(stages: Mapping[str, Any]) -> list[str]:
    """Each once, with the figures and models that it is of."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for name, reason in section(section(stages, stage), "missing").items():
            found.setdefault((name, str(reason)), []).append(str(stage))
    return [
        f"{_NAMES.get(name, name)} of {', '.join(which)}: {reason}" for (name, reason), which in found.items()
    ]


def _peaks(record: RunRecord) -> list[tuple[str, str]]:
    peaks = record.section("peaks")
    flops, moved = section(peaks, "flops"), section(peaks, "bytes_per_s")
    pairs = []
    if flops:
        shown = f"{formats.giga(flops.get('value'))} GFLOP/s ({flops.get('source')}: {flops.get('detail')})"
        pairs.append(("peak of MFU and S-MFU, a rank", shown))
    if moved and moved.get("value") is not None:
        shown = f"{formats.giga(moved['value'])} GB/s ({moved.get('source')}: {moved.get('detail')})"
        pairs.append(("peak of S-MBU, a rank", shown))
    elif moved:
        pairs.append(("peak of S-MBU, a rank", f"{NOT_MEASURED}: {moved.get('detail')}"))
    return pairs


def _energy(record: RunRecord) -> list[tuple[str, str]]:
    energy = record.section("energy")
    if not energy:
        return []
    if energy.get("kwh") is None:
        return [("energy of the run", f"{NOT_MEASURED}: {energy.get('reason')}")]
    return [("energy of the run, all that ran on its devices", f"{formats.small(energy['kwh'])} kWh")]


def _goodput(goodput: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not goodput:
        return []
    alone = formats.share(goodput.get("goodput_while_running"))
    pairs = [
        ("goodput: steps that count, of the time since the run began", formats.share(goodput.get("goodput"))),
        ("the same of the time in which a process ran", alone),
    ]
    return pairs + [(label, formats.seconds(goodput.get(key))) for key, label in _TIMES]
