"""Time and memory of the loss of a large vocabulary: in one piece, and by rows, interleaved.

Each measurement is a process of its own, whose peak resident memory counts from what it holds before.

Letters: B samples, S sequence length, D width, V vocabulary.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from recipes.models.hf import token_losses
from recipes.models.hf.head_losses import computes_losses
from recipes.runtime.machine_memory import peak_resident_bytes

_WHOLE = 2**62


@dataclass(frozen=True)
class LossShape:
    """Shape of a loss.

    Attributes:
        vocabulary: V.
        tokens: B * S.
        width: D.
    """

    vocabulary: int
    tokens: int = 2048
    width: int = 576


@dataclass(frozen=True)
class LossFigures:
    """Figures of a shape.

    Attributes:
        shape: The shape.
        whole_mib: Peak memory with all logits at once.
        rows_mib: By rows.
        whole_s: Median seconds of forward and backward pass with all logits at once.
        rows_s: By rows.
        largest_difference: Largest difference of a loss.
    """

    shape: LossShape
    whole_mib: float
    rows_mib: float
    whole_s: float
    rows_s: float
    largest_difference: float


def measure(shape: LossShape, rounds: int = 3) -> LossFigures:
    """Measures a shape in both ways, in turn."""
    found: dict[bool, list[tuple[float, float, torch.Tensor]]] = {False: [], True: []}
    for _ in range(rounds):
        for by_rows, results in found.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results.append(process.submit(_measure_here, shape, by_rows).result())
    whole, rows = found[False], found[True]
    return LossFigures(
        shape,
        whole_mib=max(mib for mib, _, _ in whole),
        rows_mib=max(mib for mib, _, _ in rows),
        whole_s=statistics.median(seconds for _, seconds, _ in whole),
        rows_s=statistics.median(seconds for _, seconds, _ in rows),
        largest_difference=float((whole[0][2] - rows[0][2]).abs().max()),
    )


def _measure_here(shape: LossShape, by_rows: bool) -> tuple[float, float, torch.Tensor]:
    """Returns the MiB above what the model takes, the seconds of the second pass, and the losses."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if not by_rows:
        token_losses.LOGITS_AT_ONCE = _WHOLE
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.width,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids_BS1 = torch.randint(shape.vocabulary, (1, shape.tokens + 1))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = peak_resident_bytes()
    for _ in range(2):
        began = time.perf_counter()
        with computes_losses(model, ids_BS1[:, 1:]):
            losses = model(input_ids=ids_BS1[:, :-1], use_cache=False)
        losses.mean().backward()
        seconds = time.perf_counter() - began
    return (peak_resident_bytes() - before) / 2**20, seconds, losses.detach()
