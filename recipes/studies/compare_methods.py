"""Compares upcycling methods on one dense checkpoint, before a GPU hour is spent.

Letters: B samples, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe.errors import ConfigError, Mistake, UserError
from moe.upcycle import upcycle_method
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.equivalence import LayerDrift, LogitDrift, logit_drift
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.jobs.option_rules import check_router
from recipes.models.hf.branches import check_sources
from recipes.models.hf.header_shape import read_ffn_shape
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.studies.option_lists import conf_choices, split_list
from recipes.upcycling.calibration.calibrate_alone import calibrate_alone
from recipes.upcycling.convert.moe_plan import MoEPlan, plan_moe, request_of
from recipes.upcycling.prompts.prompt_rows import check_prompts, with_prompt_rows
from recipes.upcycling.sharded.sharded_check import measure
from recipes.upcycling.sharded.sharded_models import materialize

# Widths of the columns after the method's name.
_WIDTHS = (9, 10, 8, 8, 12, 13, 8, 7, 7, 9, 8)
_ENTRY = re.compile(r"(\w+)(?:\[(.*)\])?")


@dataclass(frozen=True)
class MethodDrift:
    """Drift of a model under one method.

    Attributes:
        claims_exact: Whether the method claims to preserve the function under this router.
        logits: Drift of the logits.
        dense_loss: Next-token loss of the dense model, in nats.
        loss: Next-token loss of the MoE model, in nats.
        layers: Drift of each layer on the input that it sees in the MoE model.
        load_entropy: Entropy of each layer's load over that of even load; 1 is balanced.
        parameters: Number of parameters of the MoE model.
        active_share: Neurons of experts that a token uses over those of the dense network; methods with other
            shares do not compare by their KL alone.
        guess_loss: Loss of a guess, in nats: the logarithm of the vocabulary.
    """

    claims_exact: bool
    logits: LogitDrift
    dense_loss: float
    loss: float
    layers: tuple[LayerDrift, ...]
    load_entropy: tuple[float, ...]
    parameters: int
    active_share: float
    guess_loss: float

    def mean(self, field: str) -> float:
        """Computes the mean over the layers of a field of `LayerDrift`."""
        return statistics.fmean(getattr(layer, field) for layer in self.layers)


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
    trust = parse_config(compose_config(["+recipe=upcycle", *overrides])).trust_remote_code
    model, shape = load_model(dense, trust_remote_code=trust), read_ffn_shape(dense)
    with torch.no_grad():
        dense_logits = model.module(input_ids=tokens_BS).logits
    for candidate in candidates:
        try:
            values = compose_config(["+recipe=upcycle", *overrides, *candidate.overrides])
            config = parse_config(values | {"dense": str(dense)})
            if mistakes := _check(config, shape):
                raise ConfigError(mistakes)
            result: MethodDrift | UserError = _measure(config, model, tokens_BS, dense_logits)
        except UserError as error:
            result = error
        found[candidate.label] = result
        log(candidate.label, result)
    return found


def _check(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Finds why a method does not fit, before text is spent on calibrating it."""
    method = upcycle_method(config.upcycle)
    mistakes = check_router(config) or [*method.check(config.router, shape), *check_prompts(config)]
    if method.aligns_outputs:
        remedy = "Leave it false, or run graft train with train.steps=0."
        mistakes.append(Mistake("upcycle.align_outputs", True, "methods are compared without it", remedy))
    return mistakes + check_sources(method.sources, config.dense, trust_remote_code=config.trust_remote_code)


def _measure(config: RunConfig, model: HFModel, tokens_BS: Tensor, dense_BSV: Tensor) -> MethodDrift:
    with tempfile.TemporaryDirectory() as folder:
        known = calibrate_alone(config, model, Path(folder))
    if known is None:
        raise KeyboardInterrupt
    plan = plan_moe(request_of(config, model.folder), with_prompt_rows(known, config, model))
    compare = partial(logit_drift, dense_BSV)
    found = measure(plan, tokens_BS, materialize, compare, config.experts.backend)
    return MethodDrift(
        claims_exact=plan.claims_exact,
        logits=found.report.logits,
        dense_loss=_loss(dense_BSV, tokens_BS),
        loss=_loss(found.logits, tokens_BS),
        layers=found.report.drifts,
        load_entropy=found.report.load_entropy,
        parameters=sum(parameter.numel() for parameter in found.model.module.parameters()),
        active_share=_active_share(plan),
        guess_loss=math.log(found.logits.shape[-1]),
    )


def _active_share(plan: MoEPlan) -> float:
    shares = (
        (block.router.top_k * block.expert.width + block.shared_width) / ffn.shape.width
        for block, ffn in zip(plan.spec.moe_blocks, plan.ffns, strict=True)
    )
    return statistics.fmean(shares)


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    flat = logits_BSV[:, :-1].flatten(0, 1).float()
    return float(functional.cross_entropy(flat, tokens_BS[:, 1:].flatten()))


def drift_table(results: Mapping[str, MethodDrift | UserError]) -> str:
    """Formats the results, the smallest drift first, candidates that do not fit last with the reason."""
    rows = [(label, drift) for label, drift in results.items() if isinstance(drift, MethodDrift)]
    rows.sort(key=lambda row: (row[1].logits.kl, -row[1].claims_exact))
    width = max([len(label) for label in results] + [6])
    heads = (
        "claims",
        "KL",
        "loss",
        "dense",
        "rel. error",
        "worst layer",
        "cosine",
        "gain",
        "load",
        "params",
        "active",
    )
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
            f"{drift.active_share:.2f}",
        )
        lines.append(f"{label:{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True)))
    if rows and not rows[0][1].dense_loss <= rows[0][1].guess_loss:
        guess = rows[0][1].guess_loss
        lines.append(f"the dense model itself is worse than guessing (loss {guess:.3f}) on this text")
    elif worse := [label for label, drift in rows if not drift.loss <= drift.guess_loss]:
        lines.append(f"worse than guessing (loss {rows[0][1].guess_loss:.3f}): {', '.join(worse)}")
    if len({drift.active_share for _, drift in rows}) > 1:
        lines.append(
            "active: share of the dense network's neurons that a token uses; a larger one drifts less"
        )
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
