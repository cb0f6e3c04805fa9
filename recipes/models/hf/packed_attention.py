"""Measures whether a model isolates the conversations packed in a sample, and fits samples to that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from recipes.data.build_data import TrainData
from recipes.data.chat_samples import ChatSamples

# Largest share of the effect of a preceding conversation on the logits that counts as rounding.
_ROUNDING = 1e-2


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Returns True if tokens see no other conversation when positions restart with each conversation.

    It measures how much the logits of a second conversation change with the first one, with positions that
    restart and with positions that continue.

    Args:
        model: A decoder of transformers in evaluation mode.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    ids_2S = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 4, 5, 6]], device=device)

    def change(positions: list[int]) -> float:
        positions_1S = torch.tensor([positions], device=device)
        first, second = (
            model(input_ids=ids_2S[row : row + 1], position_ids=positions_1S, use_cache=False).logits[:, 3:]
            for row in (0, 1)
        )
        return float((first - second).abs().max())

    return change([0, 1, 2, 0, 1, 2]) <= _ROUNDING * change([0, 1, 2, 3, 4, 5])


def fit_attention(data: TrainData, model: Any, log: Callable[[str], None]) -> TrainData:
    """Makes positions restart with each conversation if the model isolates conversations by them.

    Args:
        data: Data of the run; text is returned unchanged.
        model: The dense decoder.
        log: Takes a line on the outcome.
    """
    if not isinstance(data.train, ChatSamples):
        return data
    if keeps_apart(model):
        log("attention: the conversations of a sample do not see one another")
        return data
    log(
        "attention: this model does not keep the conversations of a sample apart; each sees those before it, "
        "as documents of text do"
    )
    return _crossing(data)


def attending_as(data: TrainData, other: TrainData) -> TrainData:
    """Fits samples to the model that other samples have been fitted to."""
    fitted = other.train
    return data if not isinstance(fitted, ChatSamples) or fitted.isolated else _crossing(data)


def _crossing(data: TrainData) -> TrainData:
    train, validation = data.train, data.validation
    assert isinstance(train, ChatSamples) and isinstance(validation, ChatSamples), "chat data on both sides"
    return replace(data, train=train.crossing(), validation=validation.crossing())
