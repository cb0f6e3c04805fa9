"""Looks inside a mixture while text runs through it.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.data.config import DataConfig
from recipes.data.tokenizer import load_tokenizer
from recipes.models.families.open_mixture import open_mixture
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import vocabulary_size
from recipes.upcycling.convert.folder_check import fits, real_tokens
from recipes.upcycling.convert.moe_plan import StoredModel, open_dense
from recipes.upcycling.inspection.layer_figures import layer_figures
from recipes.upcycling.inspection.layer_sums import gather_layers
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize

# Samples of a forward pass; inputs of a layer on which every expert is run.
_BATCH, _INPUTS = 8, 256


@dataclass(frozen=True)
class InspectRequest:
    """Request of a user.

    Attributes:
        model: The mixture.
        data: The text.
        samples: Samples of it.
        dense: The dense model that it was made from, or None.
        trust_remote_code: Whether the model may bring its own code.
    """

    model: Path
    data: DataConfig
    samples: int
    dense: Path | None = None
    trust_remote_code: bool = False


@torch.no_grad()
def inspect(request: InspectRequest, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Returns the figures of every MoE layer; docs/inspect.md has the meaning of each key.

    The mixture is held in memory in fp32 while text runs through it.

    Args:
        request: What is asked for.
        log: Takes lines on the progress.

    Raises:
        ModelError: It is no mixture that Graft knows, it does not fit into memory, the text is too short or
            its ids do not fit, or the dense model has another shape.
    """
    folder, trust = request.model, request.trust_remote_code
    mixture = open_mixture(folder, trust_remote_code=trust)
    dense = None if request.dense is None else _open_parent(request.dense, mixture, trust)
    if not fits(folder):
        rule = "it does not fit into this machine's free memory in fp32, which looking at text needs"
        raise ModelError.one("MODEL", str(folder), rule, "Inspect it on a machine with more memory.")
    tokens_BS = _tokens(request)
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    model = materialize(mixture_model(mixture))
    model.module.eval()
    layers = model.moe_layers()
    log(f"inspect: {tokens_BS.numel()} tokens through {len(layers)} MoE layers")
    sums = gather_layers(model, tokens_BS, _BATCH, _INPUTS)
    ids_U, seen_U = tokens_BS.unique(return_counts=True)
    figures = []
    for index, layer in layers:
        base = None if dense is None else _dense_matrices(dense, index)
        found = sums.pop(index)
        figures.append(
            layer_figures(index, layer, found, ids_U, seen_U, lambda i: tokenizer.decode([i]), base)
        )
    return {
        "model": str(folder),
        "family": mixture.title,
        "router": mixture.spec.moe_blocks[0].router.config.name,
        "dense": None if request.dense is None else str(request.dense),
        "tokens": tokens_BS.numel(),
        "layers": figures,
    }


def _tokens(request: InspectRequest) -> Tensor:
    folder, trust = request.model, request.trust_remote_code
    tokens_BS = real_tokens(
        folder, request.data, request.samples, request.data.seq_len, trust_remote_code=trust
    )
    size = vocabulary_size(folder, trust_remote_code=trust)
    if int(tokens_BS.max()) >= size:
        largest = int(tokens_BS.max())
        rule = f"its tokenizer makes id {largest} of the text, and its vocabulary has {size} entries"
        raise ModelError.one("MODEL", str(folder), rule, "Give it the tokenizer that it was trained with.")
    return tokens_BS


def _open_parent(dense: Path, mixture: SourceMixture, trust: bool) -> StoredModel:
    """Opens the dense model and checks that each expert can be compared with its network."""
    try:
        stored = open_dense(dense, trust_remote_code=trust)
    except ModelError as error:
        raise ModelError([replace(mistake, path="--dense") for mistake in error.mistakes]) from error
    there = {ffn.layer: ffn.shape for ffn in stored.names.ffns}
    for moe in mixture.spec.moe_blocks:
        theirs, own = there.get(moe.index), moe.expert
        sizes = None if theirs is None else (theirs.model_width, theirs.width, theirs.gated)
        if sizes != (own.model_width, own.width, own.gated):
            rule = f"its network in block {moe.index} {_shape(sizes)}, and an expert there {_shape_of(own)}"
            remedy = "Give the dense model that the experts are copies of."
            raise ModelError.one("--dense", str(dense), rule, remedy)
    return stored


def _shape(sizes: tuple[int, int, bool] | None) -> str:
    if sizes is None:
        return "is not there"
    return f"is {sizes[0]} by {sizes[1]} wide, {'gated' if sizes[2] else 'without a gate'}"


def _shape_of(own: Any) -> str:
    return _shape((own.model_width, own.width, own.gated))


def _dense_matrices(dense: StoredModel, index: int) -> Sequence[Tensor]:
    """Reads up matrix, gate rows first, and down matrix of a block."""
    ffn = next(ffn for ffn in dense.names.ffns if ffn.layer == index)
    read: Mapping[str, Tensor] = {
        name: dense.files[0].read_matrix(dense.where(0, place)).float()
        for name, place in ffn.matrices.items()
    }
    dense.close()
    return torch.cat([read[name] for name in ("gate", "up") if name in read]), read["down"]
