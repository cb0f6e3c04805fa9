"""Sums over the tokens of a text, by layer, which all figures of its routing are made of.

Letters: B samples, S sequence length, T tokens, D model width, E experts, U different token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from moe.layer import MoELayer
from moe.metrics import LayerStats
from moe.types import Routing
from recipes.models.hf.hf_model import HFModel
from recipes.upcycling.inspection.routing_figures import choice_scores, chosen_mask, margins
from recipes.upcycling.reduce.expert_sums import ExpertSums, add_tokens, watching, zero_sums


@dataclass
class LayerSums:
    """Sums over the tokens of a text, for one layer.

    Attributes:
        used: Sums that experts' importance is made of.
        together_EE: Tokens that use both; the diagonal has each expert's own.
        by_token_UE: Occurrences of each token id that use each expert.
        stats: The statistics that training keeps, a micro-batch for each batch.
        probabilities_E: Sums of the router's probabilities; 0 without any.
        margins: ``[T]`` margins of each batch; None where the router has none that compare.
        near_ties: Tokens whose margin rounding can exceed.
        tokens: T.
        inputs: Some inputs of the layer, ``[some of T, D]`` of each batch.
    """

    used: ExpertSums
    together_EE: Tensor
    by_token_UE: Tensor
    probabilities_E: Tensor
    stats: LayerStats = field(default_factory=LayerStats)
    margins: list[Tensor] | None = field(default_factory=list)
    near_ties: int = 0
    tokens: int = 0
    inputs: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def gather_layers(model: HFModel, tokens_BS: Tensor, batch: int, inputs: int) -> dict[int, LayerSums]:
    """Runs text through a mixture and sums up, by block.

    Args:
        model: The mixture in evaluation mode, all of its weights in memory.
        tokens_BS: Ids of the text.
        batch: Samples of a forward pass.
        inputs: Inputs of each layer that are kept, evenly over the text.
    """
    ids_U = tokens_BS.unique()
    found = {index: _zeros(layer, len(ids_U)) for index, layer in model.moe_layers()}
    parts = tokens_BS.split(batch)
    every = max(1, tokens_BS.numel() // inputs)
    looks = (
        (layer, partial(_look, layer, found[index], ids_U, every)) for index, layer in model.moe_layers()
    )
    with watching(looks):
        for part_BS in parts:
            # The model's own hook is on the whole decoder, whose logits nobody needs.
            model.context.token_ids = part_BS
            model.module.base_model(input_ids=part_BS, use_cache=False)
    return found


def _zeros(layer: MoELayer, ids: int) -> LayerSums:
    E = layer.experts.shape[0]
    together_EE, by_token_UE = torch.zeros(E, E, dtype=torch.int64), torch.zeros(ids, E, dtype=torch.int32)
    return LayerSums(zero_sums(E), together_EE, by_token_UE, torch.zeros(E, dtype=torch.float64))


def _look(layer: MoELayer, sums: LayerSums, ids_U: Tensor, every: int, x_TD: Tensor, out: Routing) -> None:
    tokens_BS = layer.context.run.token_ids
    assert tokens_BS is not None and tokens_BS.numel() == len(x_TD), "every input is a token of the text"
    chosen_TE = chosen_mask(out)
    sums.stats.record(len(sums.stats.sums), out, None)
    add_tokens(sums.used, layer.experts, x_TD, out)
    # Exact: a batch has far fewer than 2^24 tokens.
    sums.together_EE += (chosen_TE.float().T @ chosen_TE.float()).long()
    places_T = torch.searchsorted(ids_U, tokens_BS.flatten())
    sums.by_token_UE.index_add_(0, places_T, chosen_TE.int())
    if out.scores_TE is not None:
        sums.probabilities_E += torch.nn.functional.normalize(out.scores_TE.double(), p=1, dim=-1).sum(0)
    _add_margins(layer, sums, out, chosen_TE)
    # Every so-and-so-many tokens of the text, whatever the batch.
    sums.inputs.append(x_TD[-sums.tokens % every :: every].clone())
    sums.tokens += len(x_TD)


def _add_margins(layer: MoELayer, sums: LayerSums, out: Routing, chosen_TE: Tensor) -> None:
    compared = choice_scores(layer.router, out)
    if compared is None or sums.margins is None:
        sums.margins = None
        return
    groups = int(getattr(layer.router.config, "num_groups", 1))
    margin_T, near_T = margins(*compared, chosen_TE, groups)
    # A router that chooses by something else leaves out experts above those that it takes. Scores that tie in
    # fp32 may come in either order.
    if bool((margin_T < -1e-6 * compared[0].abs().amax()).any()):
        sums.margins = None
        return
    sums.margins.append(margin_T.float())
    sums.near_ties += int(near_T.sum())
