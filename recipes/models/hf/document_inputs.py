"""Inputs by which a decoder of transformers keeps the documents of a sample apart.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipes.data.samples import begins_document

# Families that build their mask without positions, and take a mask of four axes in its place.
_BY_MASK = frozenset(("biogpt", "falcon", "opt", "xglm"))


def document_inputs(decoder: Any, positions_BS: Tensor | None) -> dict[str, Tensor]:
    """Returns the inputs, beside the tokens, by which no token sees another document.

    Most families of transformers read documents off positions that restart. Where no row has a boundary
    nothing is passed: the function is the same, and torch's attention keeps its causal path, without a mask.

    Args:
        decoder: The decoder; positions go to its device.
        positions_BS: Position of each token in its document; None if a sample is one document.
    """
    if positions_BS is None or not begins_document(positions_BS)[:, 1:].any():
        return {}
    weight = decoder.get_input_embeddings().weight
    inputs = {"position_ids": positions_BS.to(weight.device)}
    if decoder.config.model_type in _BY_MASK:
        inputs["attention_mask"] = _additive_mask(inputs["position_ids"], weight.dtype)
    return inputs


def _additive_mask(positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the ``[B, 1, S, S]`` term of the attention logits: 0, or a number so low that nothing is seen.

    It is no mask of booleans: eager attention would add those as numbers. It is bf16's smallest number, which
    autocast does not turn into minus infinity.
    """
    number_BS = begins_document(positions_BS).cumsum(1)
    seen_BSS = (number_BS[:, :, None] == number_BS[:, None, :]).tril()
    mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
    return mask_BSS.masked_fill(~seen_BSS, torch.finfo(torch.bfloat16).min)[:, None]
