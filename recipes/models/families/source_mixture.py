"""A mixture in files, described by its config and the files' headers before any expert is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe.routers.configs import RouterConfig
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


class SourceRouter(NamedTuple):
    """Router of a mixture.

    Attributes:
        config: Its config.
        num_experts: Number of experts of a layer.
        stores_bias: Whether its files have a place for a selection bias.
    """

    config: RouterConfig
    num_experts: int
    stores_bias: bool


@dataclass(frozen=True)
class SourceMixture:
    """A mixture in files.

    Attributes:
        title: Name of its family, for people.
        notes: What is not trained as its class would, or not at all, as clauses.
        names: Names of the tensors outside its MoE layers.
        files: Its files.
        stored: Name in the model -> name in the files, of these tensors.
        spec: Its MoE layers, with routers that have their weights.
        format: Format that writes it back.
        placement: Place of every tensor in the files.
        runs_code: Whether its model may run code that lies in its folder.
    """

    title: str
    notes: tuple[str, ...]
    names: ModelNames
    files: DenseFiles
    stored: Mapping[str, str]
    spec: ModelSpec
    format: SourceExporter
    placement: Placement
    runs_code: bool


@torch.no_grad()
def read_routers(spec: ModelSpec, placement: Placement, files: DenseFiles) -> None:
    """Gives the routers their weights, and closes the files."""
    for moe in spec.moe_blocks:
        for key, tensor in moe.router.state_dict().items():
            if (name := placement.router(moe.index, key)) is not None:
                tensor.copy_(files.read(name).view(tensor.shape))
    files.close()
