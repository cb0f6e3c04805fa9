"""Computes the dense side of the equivalence check by transformers' own loading, not by Graft's reader.

The reader makes the MoE model: what it gets wrong on both sides would not show.

Letters: B samples, S sequence length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.models.export.read_back import DenseUnread, ReadBack
from recipes.models.hf.hf_model import load_model
from recipes.runtime.heartbeat import Heartbeat
from recipes.runtime.machine_memory import collect
from recipes.upcycling.convert.folder_check import BY_BLOCK, WHOLE, fits


@dataclass(frozen=True)
class DenseSide:
    """Dense model on tokens.

    Attributes:
        logits: ``[B, S, V]`` in fp32, on the CPU.
        loader: Code that has read it, for people.
    """

    logits: Tensor
    loader: str


@torch.no_grad()
def dense_side(
    folder: Path,
    tokens_BS: Tensor,
    *,
    trust_remote_code: bool = False,
    whole: bool | None = None,
    heartbeat: Heartbeat | None = None,
) -> DenseSide:
    """Runs the dense model in fp32 on the CPU, and frees it.

    Args:
        folder: The dense checkpoint.
        tokens_BS: Real tokens.
        trust_remote_code: Whether the model may run its own code.
        whole: Whether it is loaded whole or one block at a time; None for whole where it fits into memory.
        heartbeat: Notified of each block.

    Raises:
        ModelError: transformers cannot load it.
    """
    whole = fits(folder) if whole is None else whole
    model: Any
    if whole:
        model = load_model(folder, trust_remote_code=trust_remote_code).module
    else:
        model = ReadBack(DenseUnread(folder, trust_remote_code=trust_remote_code), 0, heartbeat).model
    logits = model(input_ids=tokens_BS.cpu()).logits
    released = 4 * sum(parameter.numel() for parameter in model.parameters())
    del model
    collect(released)
    return DenseSide(logits, WHOLE if whole else BY_BLOCK)
