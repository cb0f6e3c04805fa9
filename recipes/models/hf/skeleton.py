"""A model's names, shapes and settings, without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from recipes.models.hf.hf_model import HuggingFaceHost


def empty_copy(host: HuggingFaceHost) -> HuggingFaceHost:
    """A host alike whose tensors have shapes and no memory."""
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        for param in host.model.parameters()
    }
    if host.weights is not None:
        # Nobody fills a skeleton.
        memo[id(host.weights)] = None
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in host.model.buffers()}
    return copy.deepcopy(host, memo)
