"""Compares upcycling methods on one dense checkpoint, before a GPU hour is spent."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.errors import ConfigError, Mistake, UserError
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.jobs.preflight import check_router
from recipes.models.hf.drift import MethodDrift, measure_drift
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.studies.option_lists import conf_choices, split_list
from recipes.upcycling.calibration.calibrate_alone import calibrate_alone
from recipes.upcycling.prompts.prompt_rows import check_prompts, with_prompt_rows
from recipes.upcycling.surgery import make_surgery

# Widths of the columns after the method's name.
_WIDTHS = (9, 10, 8, 8, 12, 13, 8, 7, 7, 9)
_ENTRY = re.compile(r"(\w+)(?:\[(.*)\])?")


@dataclass(frozen=True)
class Candidate:
    """One method with its options.

    Attributes:
        label: Text of the user.
        overrides: Overrides of train.py.
    """

    label: str
    overrides: tuple[str, ...]


def parse_candidates(text: str) -> list[Candidate]:
    """Reads ``copy,drop[ratio=0.25],snake[router=one_plus,router.top_k=4]``.

    Keys without a dot are the method's own (``upcycle.KEY``), but for ``router``.

    Raises:
        ConfigError: Some parts have another form or name no method; all mistakes at once.
    """
    known = conf_choices("upcycle")
    found, mistakes = [], []
    for part in split_list(text):
        match = _ENTRY.fullmatch(part)
        if match is None or match[1] not in known:
            remedy = f"Write NAME or NAME[option=value,...]; names are {', '.join(known)}."
            mistakes.append(Mistake("--compare", part, "there is no such method", remedy))
            continue
        options = split_list(match[2] or "")
        named = [o if "." in o.split("=")[0] or o.startswith("router=") else f"upcycle.{o}" for o in options]
        found.append(Candidate(part, (f"upcycle={match[1]}", *named)))
    if mistakes:
        raise ConfigError(mistakes)
    return found


def compare_methods(
    dense: Path,
    candidates: Sequence[Candidate],
    overrides: Sequence[str],
    tokens_BS: Tensor,
    log: Callable[[str, MethodDrift | UserError], None],
) -> dict[str, MethodDrift | UserError]:
    """Measures every candidate; one that does not fit is reported and stops no other.

    Args:
        dense: The dense checkpoint.
        candidates: The methods.
        overrides: Overrides of train.py for all; a candidate's own come after them.
        tokens_BS: ``[B, S]`` real tokens.
        log: Takes every result at once.
    """
    found: dict[str, MethodDrift | UserError] = {}
    model = load_model(dense)
    for candidate in candidates:
        try:
            values = compose_config(["+recipe=upcycle", *overrides, *candidate.overrides])
            config = parse_config(values | {"dense": str(dense)})
            if mistakes := check_router(config) + check_prompts(config):
                raise ConfigError(mistakes)
            result: MethodDrift | UserError = _measure(config, model, tokens_BS)
        except UserError as error:
            result = error
        found[candidate.label] = result
        log(candidate.label, result)
    return found


def _measure(config: RunConfig, model: HFModel, tokens_BS: Tensor) -> MethodDrift:
    surgery = make_surgery(config)
    if surgery.method.aligns_outputs:
        remedy = "Leave it false, or run train.py with train.steps=0."
        raise ConfigError.one("upcycle.align_outputs", True, "methods are compared without it", remedy)
    sources = [load_model(Path(folder).expanduser()) for folder in surgery.method.sources]
    if sources:
        # The rest of the model becomes a mean.
        model = load_model(model.folder)
    with tempfile.TemporaryDirectory() as folder:
        known = calibrate_alone(config, model, Path(folder))
    if known is None:
        raise KeyboardInterrupt
    return measure_drift(model, surgery, tokens_BS, sources, with_prompt_rows(known, config, model))


def drift_table(results: Mapping[str, MethodDrift | UserError]) -> str:
    """Formats the results, the smallest drift first, candidates that do not fit last with the reason."""
    rows = [(label, drift) for label, drift in results.items() if isinstance(drift, MethodDrift)]
    rows.sort(key=lambda row: (row[1].logits.kl, -row[1].claims_exact))
    width = max([len(label) for label in results] + [6])
    heads = ("claims", "KL", "loss", "dense", "rel. error", "worst layer", "cosine", "gain", "load", "params")
    lines = [f"{'method':{width}}" + "".join(f"{h:>{w}}" for h, w in zip(heads, _WIDTHS, strict=True))]
    for label, drift in rows:
        worst = max(drift.layers, key=lambda layer: layer.relative_error)
        load = sum(drift.load_entropy) / len(drift.load_entropy)
        cells = (
            "exact" if drift.claims_exact else "-",
            f"{drift.logits.kl:.1e}",
            f"{drift.loss:.3f}",
            f"{drift.dense_loss:.3f}",
            f"{drift.mean('relative_error'):.3f}",
            str(worst.layer),
            f"{drift.mean('cosine'):.3f}",
            f"{drift.mean('gain'):.2f}",
            f"{load:.2f}",
            f"{drift.parameters / 1e6:.1f}M",
        )
        lines.append(f"{label:{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True)))
    for label, error in results.items():
        if isinstance(error, UserError):
            lines += [f"{label:{width}}  does not fit: {mistake}" for mistake in error.mistakes]
    return "\n".join(lines)


def drift_figures(results: Mapping[str, MethodDrift | UserError]) -> dict[str, Any]:
    """Returns the results for programs."""
    return {
        label: {"mistakes": [str(mistake) for mistake in drift.mistakes]}
        if isinstance(drift, UserError)
        else asdict(drift)
        for label, drift in results.items()
    }
