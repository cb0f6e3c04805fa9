"""Three ways to go on from a dense checkpoint, with the law of each and the law's inputs.

Letters: B bootstrap draws, P parameters of a law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moe.errors import Mistake, UserError
from moe.scaling_laws import law_named
from moe.scaling_laws.base import Law
from moe.scaling_laws.design import FLOPS_PER_PARAMETER
from moe.scaling_laws.fit import Fit

Array = NDArray[np.float64]

Way = Literal["upcycle", "scratch", "continue"]
WAYS: tuple[Way, ...] = get_args(Way)
# Names of papers whose presets give comparable losses.
FAMILIES: tuple[str, ...] = ("liew", "joint_moe")

ASSUMPTIONS: Mapping[Way, str] = {
    "upcycle": "the law of upcycling at D1 dense tokens and D2 tokens after the conversion, for MoEs like "
    "those it was fitted to",
    "scratch": "a law of MoEs from scratch at D2 tokens, for MoEs like those it was fitted to (in the form "
    "chinchilla, N is the size of the dense model)",
    "continue": "the dense law at D1 + D2 tokens, as if trained in one run: optimistic, since a second "
    "warm-up costs, and a well-trained model gains less from more tokens (arXiv 2510.06548)",
}
_REMEDIES: Mapping[Way, str] = {
    "upcycle": "Fit liew to upcycled runs.",
    "scratch": "Fit chinchilla, joint_moe, fine_grained or apple to MoEs trained from scratch.",
    "continue": "Fit chinchilla, or joint_moe with dense runs among them.",
}
_COUNTS = (
    "dense_params",
    "dense_tokens",
    "budget_tokens",
    "budget_flops",
    "active_params",
    "total_params",
    "granularity",
)
_SIZES: Mapping[str, str] = {
    "active_params": "Give the active parameters of the MoE, i.e. those that a token uses.",
    "total_params": "Give all parameters of the MoE.",
}


@dataclass(frozen=True)
class Curve:
    """Law with coefficients, published or fitted.

    Attributes:
        law: The law.
        coefficients: ``[P]``.
        source: Origin of the coefficients.
        ranges: Ranges that they were fitted on, by input.
        draws: Bootstrap coefficients, ``[B, P]``; None without a bootstrap.
        level: Coverage probability of intervals made from the draws.
        caution: Caveats.
    """

    law: Law
    coefficients: Array
    source: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    draws: Array | None = None
    level: float = 0.95
    caution: str = ""


@dataclass(frozen=True)
class Question:
    """Dense checkpoint, intended MoE and budget; exactly one of the two budgets is given.

    Attributes:
        dense_params: N1, parameters of the dense checkpoint.
        dense_tokens: D1, tokens that it was trained on.
        budget_tokens: D2, tokens to train on, the same for all three ways.
        budget_flops: FLOPs to spend, 6 per token and active parameter: each way gets the tokens it can
            afford.
        active_params: Active parameters of the MoE.
        total_params: All parameters of the MoE.
        num_experts: Experts of an MoE layer.
        top_k: Experts per token.
        granularity: Dense FFN width over expert width.
    """

    dense_params: float
    dense_tokens: float
    budget_tokens: float | None = None
    budget_flops: float | None = None
    active_params: float | None = None
    total_params: float | None = None
    num_experts: int = 8
    top_k: int = 2
    granularity: float = 1.0


def preset_curve(law_name: str, preset_name: str) -> Curve:
    """Returns the curve of published coefficients."""
    law = law_named(law_name)
    preset = law.preset(preset_name)
    source = f"{law.name}, preset {preset.name}: {preset.source}; {preset.holds_for}"
    return Curve(law, law.vector(preset.coefficients), source, preset.ranges, caution=preset.caution)


def fitted_curve(fit: Fit, source: str) -> Curve:
    """Returns the curve of a fit, with its uncertainty."""
    caution = "; ".join(f"{name}: {why}" for name, why in fit.undetermined.items())
    draws = fit.draws if len(fit.draws) else None
    values = fit.law.vector(fit.coefficients)
    return Curve(
        fit.law, values, f"{fit.law.name}, fitted to {source}", fit.ranges, draws, fit.level, caution
    )


def family(name: str) -> dict[Way, Curve]:
    """Returns the laws of one paper, whose losses are comparable.

    Args:
        name: ``liew`` (all three ways) or ``joint_moe`` (nothing about upcycling).
    """
    if name == "liew":
        return {
            "upcycle": preset_curve("liew", "liew-2025"),
            "scratch": preset_curve("chinchilla", "liew-2025-moe"),
            "continue": preset_curve("chinchilla", "liew-2025-dense"),
        }
    joint = preset_curve("joint_moe", "ludziejewski-2025")
    return {"scratch": joint, "continue": joint}


def check_question(question: Question, curves: Mapping[Way, Curve]) -> None:
    """Verifies that these laws can answer a question.

    Raises:
        UserError: They cannot; carries all mistakes.
    """
    mistakes = []
    for name in _COUNTS:
        value = getattr(question, name)
        if value is not None and not (np.isfinite(value) and value > 0):
            mistakes.append(Mistake(name, value, "it must be a number above 0", "Give a count such as 1e9."))
    is_shape = 1 <= question.top_k <= question.num_experts
    if not is_shape:
        rule = f"it must be between 1 and the {question.num_experts} experts"
        mistakes.append(Mistake("top_k", question.top_k, rule, "Lower it, or raise the number of experts."))
    if (question.budget_tokens is None) == (question.budget_flops is None):
        both = (question.budget_tokens, question.budget_flops)
        rule = "the budget is either tokens or FLOPs"
        mistakes.append(Mistake("budget", both, rule, "Give exactly one of the two."))
    if question.budget_flops is not None and question.active_params is None:
        rule = "a budget in FLOPs needs the size of the MoE"
        mistakes.append(Mistake("active_params", None, rule, _SIZES["active_params"]))
    if len(curves) < 2:
        rule = "a comparison needs the laws of at least two ways"
        mistakes.append(Mistake("laws", sorted(curves), rule, "Give another fit, or a preset family."))
    for way, curve in curves.items() if is_shape else ():
        mistakes += _law_mistakes(question, way, curve.law)
    if mistakes:
        raise UserError([m for i, m in enumerate(mistakes) if m not in mistakes[:i]])


def _law_mistakes(question: Question, way: Way, law: Law) -> list[Mistake]:
    """Returns why a law cannot predict a way."""
    if "tokens" not in law.inputs or (way == "upcycle") != (law.name == "liew"):
        return [Mistake(way, law.name, "this law does not predict this way", _REMEDIES[way])]
    lacking = [name for name in law.inputs if name not in columns_of(question, way, law, 1.0)]
    wanted = {"params": "total_params"}
    return [
        Mistake(wanted.get(name, name), None, f"{law.name} needs it", _SIZES[wanted.get(name, name)])
        for name in lacking
    ]


def loss_at(question: Question, way: Way, curve: Curve, tokens: object, draws: bool = False) -> Array:
    """Predicts a way's loss at numbers of tokens D2; with `draws` for every bootstrap draw, ``[B, ...]``."""
    coefficients = curve.draws if draws else curve.coefficients
    assert coefficients is not None, f"{curve.source} has no draws"
    return curve.law.predict(coefficients, columns_of(question, way, curve.law, tokens))


def columns_of(question: Question, way: Way, law: Law, tokens: object) -> dict[str, object]:
    """Returns the known columns of a run of one way, as inputs of a law."""
    trained = np.asarray(tokens, dtype=np.float64)
    if way == "continue":
        size, experts, top_k, granularity = question.dense_params, 1, 1, 1.0
        found: dict[str, object] = {
            "active_params": size,
            "params": size,
            "tokens": question.dense_tokens + trained,
        }
    else:
        experts, top_k, granularity = question.num_experts, question.top_k, question.granularity
        whole = question.dense_params if law.name == "chinchilla" else question.total_params
        found = {"active_params": question.active_params, "params": whole, "tokens": trained}
    found |= {
        "dense_params": question.dense_params,
        "dense_tokens": question.dense_tokens,
        "num_experts": experts,
        "top_k": top_k,
        "sparsity": 1 - top_k / experts,
        "granularity": granularity,
    }
    return {name: value for name, value in found.items() if value is not None}


def paid_by(question: Question, way: Way, tokens: Array) -> Array:
    """Returns a way's tokens while the MoE trains on ``tokens``, by the kind of budget."""
    if way != "continue" or question.budget_flops is None:
        return tokens
    assert question.active_params is not None, question
    return tokens * (question.active_params / question.dense_params)


def tokens_of(question: Question, way: Way) -> float:
    """Returns the tokens D2 that the budget pays for."""
    if question.budget_tokens is not None:
        return question.budget_tokens
    size = question.dense_params if way == "continue" else question.active_params
    assert size is not None and question.budget_flops is not None, question
    return question.budget_flops / (FLOPS_PER_PARAMETER * size)
