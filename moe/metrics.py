"""Routing statistics, kept per micro-batch, summed over ranks, and turned into familiar figures.

Statistics of a (micro-batch, layer) are *written*, not added: activation recomputation runs the forward
pass twice and overwrites the same entry.

Letters: T tokens, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from moe.types import Routing

# Entries of a layer's packed vector after its E counts and E sums of probabilities: tokens, slots, unused
# slots, entropy sum.
_NUM_SUMS = 4
# Entries from `_distinct`, after these and the means of the losses.
_NUM_DISTINCT = 4


@dataclass
class LayerStats:
    """Statistics of one layer in the current step.

    Attributes:
        sums: Micro-batch to ``[2 E + 4]`` vector, additive over micro-batches and ranks.
        logit_max: Micro-batch to the largest absolute router logit.
        losses: Micro-batch to named losses and metrics, averaged over micro-batches and ranks.
        readers: Ranks over which the experts are sharded in equal slices, so that an expert is read once for
            the tokens of all of them. None if every rank reads the experts of its own tokens.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    logit_max: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    readers: ProcessGroup | None = None

    @torch.no_grad()
    def record(self, micro_batch: int, routing: Routing, mask_T: Tensor | None) -> None:
        """Writes the entry of a micro-batch."""
        ids_TK, E = routing.expert_ids_TK, routing.num_experts
        used_TK = torch.ones(ids_TK.shape, device=ids_TK.device)
        real_TK = used_TK if mask_T is None else used_TK * mask_T[:, None]
        if routing.slot_mask_TK is not None:
            used_TK = used_TK * routing.slot_mask_TK
        used_TK = used_TK * real_TK
        packed = torch.zeros(2 * E + _NUM_SUMS, device=ids_TK.device)
        packed[:E].scatter_add_(0, ids_TK.clamp(0, E - 1).reshape(-1), used_TK.reshape(-1))
        if routing.scores_TE is not None:
            packed[E : 2 * E], packed[-1] = _probability_sums(routing.scores_TE, mask_T)
        packed[2 * E] = real_TK[:, 0].sum()
        packed[2 * E + 1] = real_TK.sum()
        packed[2 * E + 2] = real_TK.sum() - used_TK.sum()
        self.sums[micro_batch] = packed
        if routing.logits_TE is not None and routing.logits_TE.numel():
            self.logit_max[micro_batch] = routing.logits_TE.abs().amax()
        named = {f"{name}_loss": loss for name, loss in routing.losses.items()} | dict(routing.metrics)
        self.losses[micro_batch] = {name: value.detach() for name, value in named.items()}

    def clear(self) -> None:
        """Forgets the step."""
        self.sums.clear()
        self.logit_max.clear()
        self.losses.clear()


def _probability_sums(scores_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the sums over tokens of each expert's normalised scores, and of their entropy over ln E."""
    E = scores_TE.shape[1]
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    entropy_T = torch.special.entr(probs_TE).sum(-1) / math.log(max(E, 2))
    if mask_T is not None:
        probs_TE, entropy_T = probs_TE * mask_T[:, None], entropy_T * mask_T
    return probs_TE.sum(0), entropy_T.sum()


@dataclass(frozen=True)
class LoadReport:
    """Report on a step's routing, layer by layer, over all ranks.

    Attributes:
        layers: Index of each MoE layer in the model.
        load: Share of routed slots, by layer and expert; a layer's shares sum to 1.
        per_layer: Figure to one value per layer: ``maxvio`` (largest load over the mean, minus 1;
            arXiv 2408.15664), ``load_cv`` (standard deviation over mean), ``importance_cv`` (the same for the
            experts' summed probabilities; 0 without probabilities), ``entropy`` (entropy of a token's router
            distribution, in units of ln E), ``dead_experts`` (experts without a token),
            ``experts_per_token`` (used slots over tokens), ``dropped_fraction`` (share of unused slots),
            ``logit_max`` (largest absolute logit), ``<name>_loss`` for each loss times its coefficient, and
            the router's own metrics.
        distinct: Different experts that a micro-batch used, per layer: of one rank, or of all ranks over
            which the experts are sharded; mean over micro-batches. It depends on the split into
            micro-batches.
        distinct_in_step: The same for all micro-batches together; mean over the ranks.
        busiest: Largest number of these experts that one rank read, per layer; equals `distinct` if every
            rank reads the experts of its own tokens.
        busiest_in_step: The same for all micro-batches together.
    """

    layers: tuple[int, ...]
    load: tuple[tuple[float, ...], ...]
    per_layer: Mapping[str, tuple[float, ...]]
    distinct: tuple[float, ...] = ()
    distinct_in_step: tuple[float, ...] = ()
    busiest: tuple[float, ...] = ()
    busiest_in_step: tuple[float, ...] = ()

    def means(self) -> dict[str, float]:
        """Returns each figure averaged over the layers."""
        return {name: sum(values) / len(values) for name, values in self.per_layer.items()}


def report_load(
    stats: Sequence[tuple[int, LayerStats]], group: ProcessGroup | None = None
) -> LoadReport | None:
    """Sums the layers' statistics over micro-batches and ranks, and clears them.

    Args:
        stats: Layer index and statistics of each MoE layer, the same on every rank.
        group: The ranks to sum over; None for this rank alone.

    Returns:
        The report; None if any layer has recorded nothing.
    """
    if not stats or any(not layer.sums for _, layer in stats):
        return None
    names = sorted({name for _, layer in stats for losses in layer.losses.values() for name in losses})
    sums, maxima = _pack(stats, names)
    ranks = 1
    if group is not None:
        ranks = group.size()
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(maxima, op=ReduceOp.MAX, group=group)
    report = _unpack(stats, names, sums.cpu(), maxima.cpu(), ranks)
    for _, layer in stats:
        layer.clear()
    return report


def _pack(stats: Sequence[tuple[int, LayerStats]], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    sums, maxima = [], []
    used_LME = _used_by_readers([layer for _, layer in stats])
    for (_, layer), used_ME in zip(stats, used_LME, strict=True):
        sums_M = torch.stack(list(layer.sums.values()))
        total = sums_M.sum(0).double()
        zero = total.new_zeros(())
        num = len(layer.losses)
        means = [
            sum((losses.get(name, zero) for losses in layer.losses.values()), zero) / num for name in names
        ]
        sums.append(
            torch.cat([total, torch.stack([zero, *means])[1:].double(), _distinct(used_ME, layer.readers)])
        )
        maxima.append(torch.stack([zero, *(value.double() for value in layer.logit_max.values())]).amax())
    return torch.cat(sums), torch.stack(maxima)


def _used_by_readers(layers: Sequence[LayerStats]) -> list[Tensor]:
    """Returns per layer ``[M, E]`` bool: experts with a token, over all ranks that read them together."""
    stacked = [torch.stack(list(layer.sums.values())) for layer in layers]
    used_LME = [sums_M[:, : (sums_M.shape[1] - _NUM_SUMS) // 2] > 0 for sums_M in stacked]
    for group in {id(layer.readers): layer.readers for layer in layers}.values():
        if group is None:
            continue
        theirs = [number for number, layer in enumerate(layers) if layer.readers is group]
        joined = torch.cat([used_LME[number].flatten() for number in theirs]).to(torch.uint8)
        torch.distributed.all_reduce(joined, op=ReduceOp.MAX, group=group)
        parts = torch.split(joined, [used_LME[number].numel() for number in theirs])
        for number, part in zip(theirs, parts, strict=True):
            used_LME[number] = part.view_as(used_LME[number]) > 0
    return used_LME


def _distinct(used_ME: Tensor, readers: ProcessGroup | None) -> Tensor:
    """Returns the four counts of a `LoadReport` for one layer, on the device."""
    ranks = 1 if readers is None else readers.size()
    once_E = used_ME.any(0)
    slices_MP = used_ME.view(len(used_ME), ranks, -1).sum(-1)
    counts = (
        used_ME.sum() / len(used_ME),
        once_E.sum(),
        slices_MP.amax(1).sum() / len(used_ME),
        once_E.view(ranks, -1).sum(-1).amax(),
    )
    return torch.stack([count.double() for count in counts])


def _unpack(
    stats: Sequence[tuple[int, LayerStats]], names: Sequence[str], sums: Tensor, maxima: Tensor, ranks: int
) -> LoadReport:
    per_layer: dict[str, list[float]] = {}
    load, distinct = [], []
    offset = 0
    for position, (_, layer) in enumerate(stats):
        E = (next(iter(layer.sums.values())).numel() - _NUM_SUMS) // 2
        behind = 2 * E + _NUM_SUMS
        vector = sums[offset : offset + behind + len(names)]
        offset += vector.numel()
        distinct.append([value / ranks for value in sums[offset : offset + _NUM_DISTINCT].tolist()])
        offset += _NUM_DISTINCT
        figures = _figures(vector[:E], vector[E : 2 * E], *vector[2 * E : behind].tolist())
        figures["logit_max"] = float(maxima[position])
        for name, value in zip(names, vector[behind:].tolist(), strict=True):
            figures[name] = value / ranks
        for key, number in figures.items():
            per_layer.setdefault(key, []).append(number)
        load.append(tuple((vector[:E] / vector[:E].sum().clamp_min(1)).tolist()))
    return LoadReport(
        layers=tuple(index for index, _ in stats),
        load=tuple(load),
        per_layer={key: tuple(values) for key, values in per_layer.items()},
        distinct=tuple(counts[0] for counts in distinct),
        distinct_in_step=tuple(counts[1] for counts in distinct),
        busiest=tuple(counts[2] for counts in distinct),
        busiest_in_step=tuple(counts[3] for counts in distinct),
    )


def _figures(
    counts_E: Tensor, importance_E: Tensor, tokens: float, slots: float, unused: float, entropy: float
) -> dict[str, float]:
    mean, importance = float(counts_E.mean()), float(importance_E.mean())
    safe = mean if mean > 0 else 1.0
    return {
        "maxvio": float(counts_E.max()) / safe - 1.0,
        "load_cv": float(counts_E.std(correction=0)) / safe,
        "importance_cv": float(importance_E.std(correction=0)) / (importance if importance > 0 else 1.0),
        "entropy": entropy / max(tokens, 1.0),
        "dead_experts": float((counts_E == 0).sum()),
        "experts_per_token": (slots - unused) / max(tokens, 1.0),
        "dropped_fraction": unused / max(slots, 1.0),
    }
