"""Report as tables for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.tracking.report import formats

ABSENT = "-"
HEAD = (
    "system",
    "batch",
    "TTFT",
    "TPOT",
    "tokens/s",
    "experts per layer",
    "S-MBU",
    "strict",
    "MBU",
    "S-MFU",
    "S-MFU prefill",
    "peak memory",
    "J/token",
    "$/M tokens",
)
NOTE = (
    "Decode passes unless stated otherwise. TTFT: the prefill of the batch. TPOT: mean of the decode passes. "
    "Tokens/s: written, prefill in the time. Experts per layer: distinct ones that a decode pass touches, of "
    "all there are; '<=' is the bound of uniform routing, not a count. '-' was not measured."
)
Figures = Mapping[str, Any]


def table_rows(report: Figures) -> list[list[str]]:
    """Returns the cells of every system and batch size."""
    return [_row(system, point) for system in report["systems"] for point in system["points"]]


def _row(system: Figures, point: Figures) -> list[str]:
    decode, prefill = point["decode"], point["prefill"]
    return [
        system["name"],
        str(point["batch_size"]),
        duration(point["ttft_s"] and point["ttft_s"]["median"]),
        duration(point["tpot_s"] and point["tpot_s"]["mean"]),
        _known(point["tokens_per_s"], formats.count),
        _experts(system, decode["distinct"]),
        *(_known(decode[key], formats.share) for key in ("s_mbu", "s_mbu_strict", "mbu", "s_mfu")),
        _known(prefill["s_mfu"], formats.share),
        _known(point["memory"]["peak_bytes"], formats.size),
        _known(point["energy"]["joules_per_token"], formats.small),
        _known(point["cost"]["usd_per_mtok"], formats.small),
    ]


def duration(seconds: float | None) -> str:
    """Formats a duration, below a second as ``12.3 ms``."""
    if seconds is None:
        return ABSENT
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else formats.seconds(seconds)


def _known(value: float | None, shown: Any) -> str:
    return ABSENT if value is None else str(shown(value))


def _experts(system: Figures, distinct: Figures | None) -> str:
    if distinct is None:
        return ABSENT
    bound = "" if distinct["source"] == "traced" else "<="
    return f"{bound}{distinct['mean']:.1f}/{'|'.join(str(most) for most in sorted(set(system['experts'])))}"


def accuracy_rows(report: Figures) -> list[list[str]]:
    """Returns name, perplexity, bits/byte, right choices, chance and right answers of measured systems."""
    rows = []
    for system in report["systems"]:
        text, choices = system["accuracy"]["perplexity"], system["accuracy"]["choices"]
        answers = system["accuracy"].get("answers")
        if text is None and choices is None and answers is None:
            continue
        rows.append(
            [
                system["name"],
                _known(text and text["perplexity"], formats.small),
                _known(text and text["bits_per_byte"], formats.small),
                _share(choices),
                _known(choices and choices["chance"], formats.share),
                _share(answers),
            ]
        )
    return rows


def _share(right: Figures | None) -> str:
    if right is None:
        return ABSENT
    return f"{formats.share(right['accuracy'])} +-{100 * right['standard_error']:.1f}"


HARNESS_HEAD = ("system", "task of lm-evaluation-harness", "metric", "value")


def harness_rows(report: Figures) -> list[list[str]]:
    """Returns system, task, metric and value; nothing where the harness did not run."""
    return [
        [system["name"], task, metric, _known(value, formats.small)]
        for system in report["systems"]
        for task, metrics in ((system["accuracy"]["harness"] or {}).get("tasks") or {}).items()
        for metric, value in metrics.items()
    ]


EFFICIENCY_HEAD = ("system", "batch", "AMU", "PCU", "AL", "IT, tokens/s", "AEC, W", "MCR")


def efficiency_rows(report: Figures) -> list[list[str]]:
    """Returns EfficientLLM's metrics of every system and batch size."""
    rows = []
    for system in report["systems"]:
        for point in system["points"]:
            found = point["efficientllm"]
            rows.append(
                [
                    system["name"],
                    str(point["batch_size"]),
                    _known(found["amu"], formats.share),
                    _known(found["pcu"], formats.share),
                    duration(found["al_s"]),
                    _known(found["it_tokens_per_s"], formats.count),
                    _known(found["aec_watts"], formats.small),
                    _known(system["efficientllm"]["mcr"], formats.small),
                ]
            )
    return rows


ACCURACY_HEAD = ("system", "perplexity", "bits/byte", "choices right", "chance", "answers right")


def text_of(report: Figures) -> str:
    """Returns everything that the terminal shows."""
    parts = [*peak_lines(report), "", formats.aligned(HEAD, table_rows(report))]
    accuracy = accuracy_rows(report)
    if accuracy:
        parts += ["", formats.aligned(ACCURACY_HEAD, accuracy)]
    harness = harness_rows(report)
    if harness:
        parts += ["", formats.aligned(HARNESS_HEAD, harness)]
    remarks = remarks_of(report)
    if remarks:
        parts += ["", *remarks]
    return "\n".join(parts)


def peak_lines(report: Figures) -> list[str]:
    """Returns the device and the peaks that utilisations are shares of."""
    place = report["environment"]
    lines = [f"{place['processor']}; {place['device']}; torch {place['torch']}"]
    if place["server"] is not None:
        lines = [f"{place['server']}: {place['devices']} x {place['device']}"]
    seen = []
    for system in report["systems"]:
        for key, unit in (("bytes_per_s", "GB/s"), ("flops", "GFLOP/s")):
            peak = system["peaks"][key]
            value = "not known" if peak["value"] is None else f"{peak['value'] / 1e9:,.2f} {unit}"
            half = "" if peak["median"] is None else f", median {peak['median'] / 1e9:,.2f}"
            line = f"peak {value}{half}: {peak['source'] or 'none'} ({peak['detail']})"
            if line not in seen:
                seen.append(line)
    return lines + seen


def _tiers(where: str, uses: Sequence[Figures] | None) -> Iterator[str]:
    for use in uses or ():
        share = formats.share(use["utilisation"])
        yield f"{where}: {share} of {use['name']}, {use['bytes'] / 1e9:,.3f} GB"


def remarks_of(report: Figures) -> list[str]:
    """Returns the reasons for missing figures, and the warnings, each once."""
    return list(dict.fromkeys(line for system in report["systems"] for line in _remarks(system)))


def _remarks(system: Figures) -> Iterator[str]:
    name = system["name"]
    for point in system["points"]:
        if point["reason"] is not None:
            yield f"{name}, batch {point['batch_size']}: {point['reason']}"
            continue
        for phase in ("prefill", "decode"):
            reason = point[phase]["utilisation_reason"]
            if reason is not None:
                yield f"{name}, {phase}: utilisation is missing: {reason}"
            yield from _tiers(f"{name}, batch {point['batch_size']}, {phase}", point[phase].get("tiers"))
            for warning in point[phase]["warnings"]:
                yield f"{name}, batch {point['batch_size']}, {phase}: {warning}"
        for key, value in (("memory", "peak_bytes"), ("energy", "joules")):
            if point[key][value] is None:
                yield f"{key} is missing: {point[key]['detail']}"
        if point["cost"]["usd_per_mtok"] is None:
            yield f"cost is missing: {point['cost']['reason']}"
        reached = point["reached_batch_size"]
        if reached < 0.9 * point["batch_size"]:
            yield f"{name}, batch {point['batch_size']}: only {reached:.1f} requests decoded at once"
    overhead = system["overhead"]
    if overhead is not None:
        ratio = overhead["ratio"]
        yield (
            f"{name}: watching experts takes {ratio['median'] - 1:+.1%} of TPOT "
            f"({ratio['p10'] - 1:+.1%} to {ratio['p90'] - 1:+.1%})"
        )
