"""Copies of a model with its names, shapes and settings, but no weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from recipes.models.hf.hf_model import HFModel


def empty_copy(model: HFModel) -> HFModel:
    """Returns a copy of a model whose tensors have shapes but no memory."""
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        for param in model.module.parameters()
    }
    if model.weights is not None:
        # A skeleton is never filled.
        memo[id(model.weights)] = None
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.module.buffers()}
    return copy.deepcopy(model, memo)
