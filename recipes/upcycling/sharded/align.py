"""Aligns the variance of MoE layers' outputs with that of their dense networks, channel by channel.

Letters: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from recipes.checkpoint.shard_layout import Placed, place

if TYPE_CHECKING:
    from recipes.models.hf.hf_model import HFModel


def output_gain(dense: Tensor, out: Tensor) -> Tensor:
    """Returns the gains ``[D]`` that make outputs ``[..., D]`` vary as much as the dense network's.

    Source: the release of Qu et al. 2024 (LLaMA-MoE v2, arXiv 2411.15708), without its shift of the means,
    which needs a bias that exported models do not have. 1 where a channel does not vary.
    """
    wanted_D, found_D = (value.float().flatten(0, -2).std(0) for value in (dense, out))
    gain_D = wanted_D / found_D
    return torch.where(torch.isfinite(gain_D) & (gain_D > 0), gain_D, torch.ones_like(gain_D))


@torch.no_grad()
def scale_outputs(model: HFModel, gains: Mapping[int, Tensor]) -> None:
    """Multiplies the layers' down projections by a gain for each channel; each rank its own part.

    Args:
        model: The model; its experts may be sharded over ranks.
        gains: Block index to ``[D]``, the same on all ranks.
    """
    for module in model.module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for index, layer in model.moe_layers():
        for name, parameter in layer.named_parameters():
            scale_down(name, place(name, parameter), gains[index])


def scale_down(name: str, held: Placed, gain_D: Tensor) -> None:
    """Multiplies a rank's part of a down projection or of its bias; leaves other tensors alone.

    Args:
        name: Name of the tensor; its last letters are its axes.
        held: What of it is held.
        gain_D: ``[D]`` of all channels.
    """
    leaf = name.rpartition(".")[2]
    if not leaf.startswith(("w_down", "b_down")):
        return
    axis = leaf.rpartition("_")[2].index("D")
    for piece in held.pieces:
        start, size = piece.box.offset[axis], piece.box.size[axis]
        shape = [1] * piece.tensor.ndim
        shape[axis] = size
        piece.tensor.mul_(gain_D[start : start + size].view(shape).to(piece.tensor))
