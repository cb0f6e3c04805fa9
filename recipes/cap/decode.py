"""Prefill and greedy decoding with a cache, every pass timed by itself.

On a GPU passes are timed by events in its stream: nothing waits between them. On a CPU by the clock.

Letters: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.cap.hooks import ExpertTrace, Site
from recipes.cap.phases import Passes


@dataclass(frozen=True, kw_only=True)
class Rollout(Passes):
    """One batch of sequences from prompt to last token; a pass includes the choice of its token.

    Attributes:
        sequences: Sequences of every pass, from the shape of its logits.
        ids_BS: The tokens chosen.
        cache_bytes: Bytes of the cache at the end; None where unknown.
        cache_length: Tokens in the cache; None where unknown.
    """

    sequences: tuple[int, ...]
    ids_BS: Tensor
    cache_bytes: int | None
    cache_length: int | None


class _Clock:
    """Marks between passes; read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[Any] = []
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def mark(self) -> None:
        if self._device.type != "cuda":
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._times.append(event)

    def seconds(self) -> tuple[float, ...]:
        pairs = zip(self._times, self._times[1:], strict=False)
        if self._device.type != "cuda":
            return tuple(after - before for before, after in pairs)
        torch.cuda.synchronize(self._device)
        return tuple(before.elapsed_time(after) / 1e3 for before, after in pairs)


def keeps_logits(model: Any) -> bool:
    """Returns True if a model can compute the logits of the last token alone, as serving does."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


@torch.no_grad()
def roll_out(model: Any, prompt_BS: Tensor, new: int, sites: Sequence[Site] | None = None) -> Rollout:
    """Reads a prompt and writes ``new`` tokens per sequence; ends of sequences do not stop it.

    Args:
        model: A decoder of transformers.
        prompt_BS: On its device, without padding.
        new: Tokens; the first is of the prefill, each other of a decode pass.
        sites: MoE layers to watch; None for none.
    """
    device = prompt_BS.device
    watch = None if sites is None else ExpertTrace(sites, new, device)
    last = {"logits_to_keep": 1} if keeps_logits(model) else {}
    chosen: list[Tensor] = []
    sequences: list[int] = []
    cache, step_BS = None, prompt_BS
    with watch or nullcontext():
        clock = _Clock(device)
        clock.mark()
        for _ in range(new):
            if watch is not None:
                watch.next_pass()
            out = model(input_ids=step_BS, past_key_values=cache, use_cache=True, **last)
            step_BS = out.logits[:, -1].argmax(-1, keepdim=True)
            clock.mark()
            chosen.append(step_BS)
            sequences.append(out.logits.shape[0])
            cache = out.past_key_values
        seconds = clock.seconds()
    return Rollout(
        seconds=seconds,
        sequences=tuple(sequences),
        distinct=None if watch is None else tuple(watch.distinct()),
        ids_BS=torch.cat(chosen, dim=1).cpu(),
        cache_bytes=_cache_bytes(cache),
        cache_length=_cache_length(cache),
    )


def _cache_tensors(cache: Any) -> Iterator[Tensor]:
    for layer in getattr(cache, "layers", ()):
        for value in vars(layer).values():
            if isinstance(value, Tensor) and value.dim() > 1:
                yield value


def _cache_bytes(cache: Any) -> int | None:
    found = [tensor.numel() * tensor.element_size() for tensor in _cache_tensors(cache)]
    return sum(found) if found else None


def _cache_length(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None
