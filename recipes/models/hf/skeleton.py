"""A model's names, shapes and settings, without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from recipes.models.hf.hf_model import HFModel


def empty_copy(model: HFModel) -> HFModel:
    """A host alike whose tensors have shapes and no memory."""
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        for param in model.module.parameters()
    }
    if model.weights is not None:
        # Nobody fills a skeleton.
        memo[id(model.weights)] = None
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.module.buffers()}
    return copy.deepcopy(model, memo)
