"""All figures of one MoE layer, as they are written to JSON.

Letters: N tokens, E experts, U different token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.layer import MoELayer
from moe.metrics import report_load
from moe.routing.draws import seeded_generator
from recipes.models.hf.load_entropy import relative_entropy
from recipes.upcycling.inspection.layer_sums import LayerSums
from recipes.upcycling.inspection.likeness import (
    aligned_cosine,
    centred_gram,
    distances,
    linear_cka,
    mean_cosine,
    neurons,
    weight_cosine,
)
from recipes.upcycling.inspection.routing_figures import (
    co_activation_lift,
    conditional_share,
    favourite_tokens,
    vocabulary_specialisation,
)
from recipes.upcycling.prune.criteria import criteria
from recipes.upcycling.reduce.expert_sums import expert_output

#: Outputs of twins are at least so much alike, by CKA and by the cosine of their means.
TWIN = 0.99
# Pairs of a layer whose neurons are aligned: those of the most alike outputs. Wider ones take minutes.
_ALIGNED, _WIDEST = 8, 4096
# Occurrences of a token id that count (fewer make shares of 1 by chance), and ids that are listed.
_LEAST, _LISTED = 10, 8
_CRITERIA = ("reap", "ean", "usage")
Figures = dict[str, Any]


def layer_figures(
    index: int,
    layer: MoELayer,
    sums: LayerSums,
    ids_U: Tensor,
    seen_U: Tensor,
    spell: Callable[[int], str],
    dense: Sequence[Tensor] | None,
) -> Figures:
    """Returns the figures of a layer; docs/inspect.md has the meaning of each key.

    Args:
        index: Its block.
        layer: The layer, its weights in memory.
        sums: Sums over the text.
        ids_U: The token ids of the text.
        seen_U: Occurrences of each.
        spell: Spells a token id.
        dense: Up and down matrix of the dense network of that block, or None.
    """
    found: Figures = {"layer": index, "experts": layer.experts.shape[0]}
    found |= _load(index, sums) | _margins(sums, int(seen_U.sum()))
    found |= _together(sums, int(seen_U.sum())) | _importance(sums) | _likeness(layer, sums)
    found["distance_from_mean"] = plain(distances(layer.experts))
    found["distance_from_dense"] = None if dense is None else plain(distances(layer.experts, dense))
    return found | _vocabulary(sums, ids_U, seen_U, spell)


def plain(values: Tensor) -> Any:
    """Returns numbers as lists with six digits, None for those that are not finite."""
    if values.dim() == 0:
        value = float(values)
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [plain(row) for row in values]


def _load(index: int, sums: LayerSums) -> Figures:
    counts_E = sums.used.counts_E
    report = report_load([(index, sums.stats)])
    assert report is not None, "the router has run"
    figures = {name: values[0] for name, values in report.per_layer.items()}
    has_probabilities = bool(sums.probabilities_E.any())
    spread = relative_entropy(sums.probabilities_E)
    fair = counts_E.mean()
    return {
        "load": list(report.load[0]),
        "tokens_by_expert": counts_E.long().tolist(),
        "experts_per_token": figures["experts_per_token"],
        "max_vio": figures["maxvio"],
        "load_cv": figures["load_cv"],
        "load_entropy": relative_entropy(counts_E),
        "token_entropy": figures["entropy"] if has_probabilities else None,
        "mean_probability_entropy": spread if has_probabilities else None,
        "token_expert_information": spread - figures["entropy"] if has_probabilities else None,
        "mean_probability": plain(sums.probabilities_E / sums.probabilities_E.sum())
        if has_probabilities
        else None,
        "dead": (counts_E == 0).nonzero().flatten().tolist(),
        "below_1_percent": (counts_E < 0.01 * fair).nonzero().flatten().tolist(),
        "below_10_percent": (counts_E < 0.1 * fair).nonzero().flatten().tolist(),
    }


def _margins(sums: LayerSums, tokens: int) -> Figures:
    if sums.margins is None:
        return {"margin_quantiles": None, "near_ties": None}
    margin_T = torch.cat(sums.margins)
    known_T = margin_T[margin_T.isfinite()]
    if not len(known_T):
        return {"margin_quantiles": None, "near_ties": None}
    places = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    # Sorted and indexed: torch.quantile takes 2^24 numbers at most.
    rows = known_T.sort().values[((len(known_T) - 1) * places).round().long()]
    quantiles = {f"{100 * place:g}": value for place, value in zip(places.tolist(), plain(rows), strict=True)}
    return {"margin_quantiles": quantiles, "near_ties": sums.near_ties / tokens}


def _together(sums: LayerSums, tokens: int) -> Figures:
    lift_EE = co_activation_lift(sums.together_EE, tokens)
    return {
        "co_activation": sums.together_EE.tolist(),
        "co_activation_given": plain(conditional_share(sums.together_EE)),
        "co_activation_lift": plain(lift_EE.fill_diagonal_(torch.nan)),
    }


def _importance(sums: LayerSums) -> Figures:
    known, draw = criteria(), seeded_generator(0, "inspect")
    return {f"importance_{name}": plain(known[name].scores_E(sums.used, draw)) for name in _CRITERIA}


def _likeness(layer: MoELayer, sums: LayerSums) -> Figures:
    x_ND, E = torch.cat(sums.inputs), layer.experts.shape[0]
    means, grams = [], []
    for expert in range(E):
        out_ND = expert_output(layer.experts, expert, x_ND)
        means.append(out_ND.double().mean(0))
        grams.append(centred_gram(out_ND))
    cosine_EE = mean_cosine(torch.stack(means))
    cka_EE = linear_cka(torch.stack(grams)) if len(x_ND) > 3 else torch.full((E, E), torch.nan)
    pairs = [(i, j) for i in range(E) for j in range(i + 1, E)]
    twins = [pair for pair in pairs if cka_EE[pair] >= TWIN and cosine_EE[pair] >= TWIN]
    alike = sorted(pairs, key=lambda pair: -float(cka_EE[pair].nan_to_num(-1)))
    return {
        "output_tokens": len(x_ND),
        "output_cka": plain(cka_EE),
        "mean_output_cosine": plain(cosine_EE),
        "twins": [list(pair) for pair in twins],
        "weight_cosine": plain(weight_cosine(layer.experts)),
        "aligned": _aligned(layer, alike[:_ALIGNED]),
    }


def _aligned(layer: MoELayer, pairs: Sequence[tuple[int, int]]) -> list[Figures] | None:
    if layer.experts.shape[2] > _WIDEST:
        return None
    rows = []
    for i, j in pairs:
        cosine, stay = aligned_cosine(neurons(layer.experts, i), neurons(layer.experts, j))
        rows.append({"experts": [i, j], "cosine": cosine, "neurons_in_place": stay})
    return rows


def _vocabulary(sums: LayerSums, ids_U: Tensor, seen_U: Tensor, spell: Callable[[int], str]) -> Figures:
    mean, coverage = vocabulary_specialisation(sums.by_token_UE, seen_U, _LEAST)
    listed = [
        [
            {
                "id": int(ids_U[place]),
                "text": spell(int(ids_U[place])),
                "routed": int(sums.by_token_UE[place, expert]),
                "occurrences": int(seen_U[place]),
            }
            for place in favourite_tokens(sums.by_token_UE, seen_U, expert, _LEAST, _LISTED)
        ]
        for expert in range(sums.by_token_UE.shape[1])
    ]
    specialisation = mean if math.isfinite(mean) else None
    return {
        "vocabulary_specialisation": specialisation,
        "vocabulary_coverage": coverage,
        "favourite_tokens": listed,
    }
