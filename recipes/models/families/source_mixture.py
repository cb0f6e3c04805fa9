"""A mixture in files, described by its config and the files' headers before any expert is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recipes.models.export.base import Exporter
from recipes.models.export.placement import Placement
from recipes.models.export.spec import ModelSpec
from recipes.models.hf.ffn_names import ModelNames
from recipes.models.safetensors.dense_files import DenseFiles


class SourceExporter(Exporter):
    """Format of one checkpoint, in which what is not trained is written back bit for bit.

    Attributes:
        dtype: Dtype of most weights: files asked for in it have every tensor in its own dtype.
    """

    dtype: torch.dtype


@dataclass(frozen=True)
class SourceMixture:
    """A mixture in files.

    Attributes:
        title: Name of its family, for people.
        left_out: What its class does in training alone and Graft does not, as clauses.
        names: Names of the tensors outside its MoE layers.
        files: Its files.
        stored: Name in the model -> name in the files, of these tensors.
        spec: Its MoE layers, with routers that have their weights.
        format: Format that writes it back.
        placement: Place of every tensor in the files.
    """

    title: str
    left_out: tuple[str, ...]
    names: ModelNames
    files: DenseFiles
    stored: Mapping[str, str]
    spec: ModelSpec
    format: SourceExporter
    placement: Placement


@torch.no_grad()
def read_routers(spec: ModelSpec, placement: Placement, files: DenseFiles) -> None:
    """Gives the routers their weights, and closes the files."""
    for moe in spec.moe_blocks:
        for key, tensor in moe.router.state_dict().items():
            if (name := placement.router(moe.index, key)) is not None:
                tensor.copy_(files.read(name).view(tensor.shape))
    files.close()
