"""Model without memory of a mixture in files, whose ranks each read their own part.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from recipes.checkpoint.shard_layout import Box, Piece, Placed
from recipes.models.hf.deferred_init import CheckpointWeights, WeightSource
from recipes.models.hf.state_dict_map import StateDictMap, StateDictPiece
from recipes.upcycling.convert.moe_plan import StoredModel
from recipes.upcycling.sharded.sharded_models import insert_moe_layers, model_of
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights

if TYPE_CHECKING:
    from recipes.models.families.source_mixture import SourceMixture
    from recipes.models.hf.hf_model import HFModel


def mixture_model(mixture: SourceMixture, backend: str = "auto", *, reads: bool = True) -> HFModel:
    """Returns the model with Graft's layers in the place of transformers' own.

    Args:
        mixture: The mixture.
        backend: Back end of the experts.
        reads: Whether weights are read from its files; else a checkpoint has them. Routers have theirs.
    """
    weights: WeightSource = MixtureWeights(mixture) if reads else CheckpointWeights()
    folder = mixture.files.folder
    model = model_of(mixture.names, folder, weights, trust_remote_code=mixture.runs_code)
    insert_moe_layers(model, mixture.spec, backend)
    # Its routers are Graft's: transformers finds none to make a loss of.
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    model.source_dtype = mixture.format.dtype
    return model


class MixtureWeights(UpcycledWeights):
    """Weights of a mixture, read box by box."""

    def __init__(self, mixture: SourceMixture) -> None:
        """Stores the places; reads nothing yet."""
        super().__init__(StoredModel(mixture.names, (mixture.files,), (mixture.stored,), ()))
        self._files = mixture.files
        self._placement = mixture.placement
        self._live = StateDictMap(mixture.spec)

    @torch.no_grad()
    def _make(self, held: Mapping[str, Placed]) -> int:
        """Reads this rank's parts of experts; returns the number of elements."""
        filled = 0
        for name, placed in held.items():
            for part in self._live.pieces(name) or ():
                filled += sum(self._fill_part(part, placed, piece) for piece in placed.pieces)
        return filled

    def _fill_part(self, part: StateDictPiece, placed: Placed, piece: Piece) -> int:
        """Reads the rows of one expert's matrix that a piece of memory holds, all of their columns."""
        lead = 0 if part.expert is None else 1
        start, stop, _ = part.rows.indices(placed.shape[lead])
        more = placed.shape[lead + 1 :]
        outer = () if part.expert is None else (part.expert,)
        box = Box((*outer, start, *(0 for _ in more)), (*(1 for _ in outer), stop - start, *more))
        common = piece.box.overlap(box)
        if common is None:
            return 0
        rows, *columns = common.within(box)[lead:]
        slot, width = self._placement.slot(part.piece), torch.Size(more).numel()
        begin, end = slot.offset + rows.start * width, slot.offset + rows.stop * width
        run = self._files.read_run(slot.name, begin, end).view(rows.stop - rows.start, *more)
        view = piece.tensor[common.within(piece.box)]
        (view[0] if lead else view).copy_(run[(slice(None), *columns)])
        return common.numel
