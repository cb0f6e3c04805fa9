"""Use of the hardware by a run's training, and the shares of its time, as plain text."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.tracking.report import formats
from recipes.tracking.report.formats import NOT_MEASURED
from recipes.tracking.report.results_table import find, read_results
from recipes.tracking.report.run_record import RunRecord, section
from recipes.tracking.training_figures import SHARES, summarise_stage

_NAMES = {"mfu": "MFU", "s_mfu": "S-MFU", "s_mbu": "S-MBU", "memory_bytes": "memory", "energy_j": "energy"}
_TIMES = (
    ("steps_s", "optimizer steps that count"),
    ("lost_steps_s", "steps that were lost and done again"),
    ("evaluation_s", "evaluation"),
    ("saving_s", "saving checkpoints"),
    ("other_s", "start-up, data, surgery, export"),
    ("down_s", "between the processes of the run"),
)


def training_rows(record: RunRecord) -> list[list[str]]:
    """Returns speed, utilisation, memory and energy of each stage that measured any."""
    stages, results = record.section("training"), read_results(record.summary)
    found = {stage: summarise_stage(rows) for stage, rows in record.stages.items()}
    return [
        [
            find(results, stage).label,
            formats.count(figures["tokens_per_s"]),
            *(formats.share(figures[name]) for name in SHARES),
            formats.size(figures["memory_bytes"]),
            formats.small(figures["joules_per_token"]),
        ]
        for stage, figures in found.items()
        if stage in stages or figures["s_mbu"] is not None
    ]


def unmeasured(record: RunRecord) -> list[str]:
    """Returns every reason for a missing figure once, with the figure and the models that it concerns."""
    stages = record.section("training")
    found: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for name, reason in section(section(stages, stage), "missing").items():
            found.setdefault((name, str(reason)), []).append(str(stage))
    return [
        f"{_NAMES.get(name, name)} of {', '.join(which)}: {reason}" for (name, reason), which in found.items()
    ]


def use(record: RunRecord) -> list[tuple[str, str]]:
    """Returns peaks, energy and goodput of the run."""
    peaks, energy, goodput = (record.section(name) for name in ("peaks", "energy", "goodput"))
    pairs = [
        *_peak(section(peaks, "flops"), "peak of MFU and S-MFU, a rank", "GFLOP/s"),
        *_peak(section(peaks, "bytes_per_s"), "peak of S-MBU, a rank", "GB/s"),
    ]
    if energy and energy.get("kwh") is None:
        pairs.append(("energy of the run", f"{NOT_MEASURED}: {energy.get('reason')}"))
    elif energy:
        used = f"{formats.small(energy['kwh'])} kWh"
        pairs.append(("energy of the run, all that ran on its devices", used))
    if goodput:
        share, alone = (formats.share(goodput.get(name)) for name in ("goodput", "goodput_while_running"))
        pairs.append(("goodput: steps that count, of the time since the run began", share))
        pairs.append(("the same, of the time in which a process ran", alone))
        pairs += [(label, formats.seconds(goodput.get(key))) for key, label in _TIMES]
    return pairs


def _peak(peak: Mapping[str, object], label: str, unit: str) -> list[tuple[str, str]]:
    if not peak:
        return []
    if peak.get("value") is None:
        return [(label, f"{NOT_MEASURED}: {peak.get('detail')}")]
    return [(label, f"{formats.giga(peak['value'])} {unit} ({peak.get('source')}: {peak.get('detail')})")]
