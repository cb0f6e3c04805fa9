"""The sections of the report: each turns a run into pieces of HTML, and says where a figure is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from recipes.tracking.metrics_log import METRICS_FILE
from recipes.tracking.report import formats, html
from recipes.tracking.report.formats import NOT_MEASURED, number
from recipes.tracking.report.results_table import (
    MODELS,
    caveats,
    cells,
    find,
    header,
    headline,
    missing,
    read_results,
)
from recipes.tracking.report.run_record import CONFIG_FILE, SUMMARY_FILE, RunRecord, section, series

_ROUTING = (
    ("maxvio", "MaxVio (largest load / mean - 1)", formats.small),
    ("load_cv", "load CV (standard deviation / mean)", formats.small),
    ("entropy", "router entropy (1 = ln E, uniform)", formats.small),
    ("dead_experts", "experts of a layer without a token", formats.small),
    ("dropped_fraction", "routed slots that were dropped", formats.share),
    ("logit_max", "largest router logit", formats.small),
)
_TAIL = 0.1  # of a run's steps, over which the routing at its end is averaged


def introduction(record: RunRecord) -> list[str]:
    """Name, date and the run in one sentence; what is missing in it."""
    run = record.section("run")
    started, lasted = number(run.get("started")), number(run.get("seconds"))
    meta = [f"recipe {run['recipe']}"] if run.get("recipe") else []
    if started is not None:
        meta.append(f"started {datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC")
    if lasted is not None:
        meta.append(f"took {formats.seconds(lasted)}")
    results = read_results(record.summary)
    pieces = [html.title(_name(record)), html.paragraph(" - ".join(meta), "meta") if meta else ""]
    pieces.append(html.paragraph(headline(results), "lead"))
    gone = missing_parts(record)
    if gone:
        pieces += [html.heading("Not measured in this run"), html.box([html.bullets(gone)])]
    return pieces


def missing_parts(record: RunRecord) -> list[str]:
    """What a complete run directory has and this one has not."""
    gone = []
    if not record.summary:
        gone.append(f"{SUMMARY_FILE}: the run has not come to its end, or was stopped")
    else:
        gone += missing(read_results(record.summary))
        gone += [
            f"{name} (in {SUMMARY_FILE})" for name in ("exactness", "export") if not record.section(name)
        ]
    if not record.stages:
        gone.append(f"{METRICS_FILE}: no row, so there are no curves")
    elif not record.loads:
        gone.append("load of the experts over time")
    if record.config is None:
        gone.append(f"{CONFIG_FILE}: the configuration")
    return gone


def results(record: RunRecord) -> list[str]:
    """The models side by side."""
    found = read_results(record.summary)
    if not found:
        return [html.heading("Results"), html.paragraph(f"{NOT_MEASURED}: see above.", "note")]
    notes = [html.paragraph(text, "note") for text in caveats(found)]
    return [html.heading("Results"), html.table(header(), cells(found), NOT_MEASURED), *notes]


def routing(record: RunRecord) -> list[str]:
    """How balanced the routing was in the end."""
    rows = record.stages.get("moe", ())
    pairs = []
    for name, label, show in _ROUTING:
        _, values = series(rows, f"router/{name}")
        if values.size:
            tail = values[-max(1, round(_TAIL * values.size)) :]
            pairs.append((label, show(float(tail.mean()))))
    if not pairs:
        return []
    text = f"Mean over the MoE layers and the last {100 * _TAIL:g} % of the logged steps:"
    return [html.paragraph(text, "note"), html.facts(pairs, NOT_MEASURED)]


def throughput(record: RunRecord) -> list[str]:
    """Speed and time of each leg, then of the whole run."""
    timings, found = record.section("timings"), read_results(record.summary)
    rows = []
    for stage in (
        name for name in MODELS if name in record.stages or number(timings.get(f"{name}_s")) is not None
    ):
        logged = record.stages.get(stage, ())
        steps = [row["step"] for row in logged if number(row.get("step")) is not None]
        speed = find(found, stage).tokens_per_s or _median(logged, "tokens_per_s")
        rows.append(
            [
                "Dense (its own training)" if stage == "dense" else find(found, stage).label,
                formats.count(max(steps) if steps else None),
                formats.count(speed),
                formats.share(_median(logged, "mfu")),
                formats.seconds(timings.get(f"{stage}_s")),
            ]
        )
    pieces = [html.heading("Throughput and time")]
    if rows:
        head = ["training of", "steps", "tokens/s", "MFU (median)", "time"]
        pieces.append(html.table(head, rows, NOT_MEASURED))
    total = timings.get("total_s", record.section("run").get("seconds"))
    facts = [
        ("from start to the end of the first step", formats.seconds(timings.get("first_step_s"))),
        ("the whole run", formats.seconds(total)),
    ]
    facts.append(("peak memory, all ranks", formats.size(record.summary.get("peak_memory_bytes"))))
    facts += [(str(key), _text(value)) for key, value in record.section("machine").items()]
    backend = record.section("experts")
    if backend:
        facts.append(("expert kernels", f"{backend.get('backend')}: {backend.get('reason')}"))
    return [*pieces, html.facts(facts, NOT_MEASURED)]


def exactness(record: RunRecord) -> list[str]:
    """Whether the conversion kept the function, as measured at step 0."""
    measured = record.section("exactness")
    pieces = [html.heading("Exactness of the conversion")]
    if not measured:
        return [*pieces, html.box([html.paragraph(f"The drift of the logits was {NOT_MEASURED}.")])]
    claims = {True: "claims to be exact", False: "does not claim to be exact"}.get(
        measured.get("claimed_exact") is True, ""
    )
    facts = [
        ("upcycling method", f"{measured.get('method', NOT_MEASURED)}, {claims} under this router"),
        ("largest difference of a logit", formats.small(measured.get("max_logit_diff"))),
        ("largest logit of the dense model", formats.small(measured.get("max_logit"))),
        ("difference relative to it", formats.small(measured.get("relative"))),
    ]
    if "kl" in measured:
        facts.append(("KL divergence (nats/token)", formats.small(measured["kl"])))
    if "argmax_agreement" in measured:
        facts.append(("tokens with the same best prediction", formats.share(measured["argmax_agreement"])))
    text = "Logits of the dense model and of the mixture before its first training step, on real tokens."
    pieces += [html.paragraph(text, "note"), html.facts(facts, NOT_MEASURED)]
    layers = measured.get("layers")
    return (
        [*pieces, *_layer_drifts(layers)] if layers and measured.get("claimed_exact") is not True else pieces
    )


def _layer_drifts(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an inexact method did to each layer."""
    columns = {
        "relative error": "relative_error",
        "cosine": "cosine",
        "gain": "gain",
        "entropy of the load": "load_entropy",
    }
    rows = [
        [str(row.get("layer")), *(formats.decimal(row.get(key)) for key in columns.values())]
        for row in layers
    ]
    text = (
        "Each mixture against its dense network on the same input: |moe - dense| / |dense|, the cosine of "
        "the outputs, |moe| / |dense|, and where the tokens go (1: evenly to all experts)."
    )
    return [html.paragraph(text, "note"), html.table(["layer", *columns], rows, NOT_MEASURED)]


def export(record: RunRecord) -> list[str]:
    """How to load the exported model."""
    exported = record.section("export")
    pieces = [html.heading("Load the exported model")]
    if not exported:
        return [*pieces, html.box([html.paragraph("This run has exported no model.")])]
    drift = formats.small(exported.get("relative"))
    text = (
        f"Format: {exported.get('format', 'unknown')}. Reloaded from its files, its logits differed from the "
        f"trained model's by {drift} of the largest logit."
    )
    if number(exported.get("relative")) is None:
        text = f"Format: {exported.get('format', 'unknown')}. Its logits after reloading were {NOT_MEASURED}."
    pieces += [html.paragraph(text), html.code(_snippet(record, exported))]
    sample = _sample(exported.get("sample"))
    if sample:
        pieces += [html.paragraph("What it wrote, word by word the likeliest:", "note"), html.code(sample)]
    return pieces


def configuration(record: RunRecord) -> list[str]:
    """The resolved configuration, folded."""
    if record.config is None:
        return []
    return [html.heading("Configuration"), html.folded(CONFIG_FILE, record.config)]


def _name(record: RunRecord) -> str:
    return str(record.section("run").get("name") or record.run_dir.resolve().name)


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    _, values = series(rows, name)
    return float(np.median(values)) if values.size else None


def _text(value: Any) -> str:
    """A value of the machine section as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return NOT_MEASURED if value is None else str(value)


def _snippet(record: RunRecord, exported: Mapping[str, Any]) -> str:
    """Python that loads the model: transformers alone, or Graft for its own format."""
    folder = str(record.run_dir / str(exported.get("path") or "hf"))
    if exported.get("format") == "graft" or exported.get("native") is False:
        return (
            "from pathlib import Path\n\nfrom transformers import AutoTokenizer\n\n"
            "from recipes.models.export.graft_format import load_graft  # in Graft's folder\n\n"
            f"path = Path({folder!r})\n"
            "model = load_graft(path).model\n"
            "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        ) + _GENERATE
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"path = {folder!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(path)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
    ) + _GENERATE


_GENERATE = (
    'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
)


def _sample(sample: Any) -> str:
    """The text of a generated sample, which is JSON with ``prompt`` and ``text``, or plain."""
    if not isinstance(sample, str):
        return ""
    try:
        content = json.loads(sample)
    except ValueError:
        return sample
    return str(section({"sample": content}, "sample").get("text", "")) or sample
