"""Losses of a transformers decoder, whose output head sees some tokens at a time.

Families do more than one product between the last hidden state and the logits: they scale them (Granite,
Cohere) or cap them (Gemma). So the decoder's own forward pass computes them, with its blocks replaced by
their output.

Letters: B samples, S sequence length, D width, T tokens of a part, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from recipes.models.hf.token_losses import losses_by_rows, rows_at_once, target_losses

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


@contextmanager
def computes_losses(decoder: Any, targets_BS: Tensor) -> Iterator[None]:
    """While open, calls of a decoder return the ``[B * S]`` fp32 losses of targets in place of logits.

    The call may go through a wrapper of the decoder, such as FSDP2's or DeepSpeed's. FSDP2 wants no view of a
    tensor, so that the caller gives them the shape of the targets.

    Args:
        decoder: A decoder of transformers with a language-modelling head.
        targets_BS: ``[B, S]`` ids, the next token of each input.
    """
    forward = partial(type(decoder).forward, decoder)
    decoder.forward = partial(_losses, decoder, forward, targets_BS)
    try:
        yield
    finally:
        del decoder.forward


def _losses(decoder: Any, forward: Callable[..., Any], targets_BS: Tensor, **inputs: Any) -> Tensor:
    text = decoder.config.get_text_config()
    rows = rows_at_once(text.vocab_size, getattr(text, "hidden_size", 1))
    # Code of others may not say which module its blocks are: the losses are the same, and take more memory.
    if targets_BS.numel() <= rows or decoder.base_model_prefix not in decoder._modules:
        return target_losses(forward(**inputs).logits, targets_BS)
    output = _output_of_blocks(decoder, forward, inputs)
    hidden_BSD = output.last_hidden_state

    def losses_of(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        part = type(output)(last_hidden_state=hidden_TD[None])
        with _replaced(decoder, lambda blocks, *_, **__: part):
            logits_1TV = forward(input_ids=targets_T[None], use_cache=False).logits
        return target_losses(logits_1TV, targets_T[None])

    return losses_by_rows(losses_of, hidden_BSD.flatten(0, 1), targets_BS.flatten(), rows)


def _output_of_blocks(decoder: Any, forward: Callable[..., Any], inputs: dict[str, Any]) -> ModelOutput:
    """Runs a forward pass whose head sees no token; returns the output of the blocks."""
    found: list[Any] = []

    def run(blocks: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        found.append(blocks(*args, **kwargs))
        return type(found[0])(last_hidden_state=found[0].last_hidden_state[:, :0])

    with _replaced(decoder, run):
        forward(**inputs)
    return found[0]


@contextmanager
def _replaced(decoder: Any, output: Callable[..., ModelOutput]) -> Iterator[None]:
    """While open, a function stands for a decoder's blocks: it takes them and their inputs."""
    name = decoder.base_model_prefix
    blocks = decoder._modules[name]
    decoder._modules[name] = _Blocks(blocks, output)
    try:
        yield
    finally:
        decoder._modules[name] = blocks


class _Blocks:
    """Stands for the blocks of a decoder while it is called; what else is read of them is their own."""

    def __init__(self, blocks: nn.Module, output: Callable[..., ModelOutput]) -> None:
        self._blocks = blocks
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self._output(self._blocks, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._blocks, name)
        # OPT calls the decoder within its blocks.
        return _Blocks(found, self._output) if name == "decoder" else found
