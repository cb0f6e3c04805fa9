"""Runs text through a mixture, and compares files that were made of it with what their own class computes.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe.errors import ExactnessError, ModelError
from moe.upcycle.equivalence import TOLERANCES, agree, logit_drift
from recipes.data.build_data import load_data
from recipes.data.config import DataConfig
from recipes.data.samples import Samples
from recipes.models.export.read_back import ReadBack, Unread
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import vocabulary_size
from recipes.runtime.machine_memory import collect
from recipes.upcycling.convert.folder_check import fits
from recipes.upcycling.reduce.expert_sums import ExpertSums, gather_sums
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize

_BATCH = 8  # samples of a forward pass


@dataclass(frozen=True)
class TextRequest:
    """Mixture and text of a user.

    Attributes:
        model: The mixture.
        data: Text, split into what is looked at and what is held out.
        samples: Samples that are looked at, and at most so many that are held out.
        trust_remote_code: Whether the model may bring its own code.
    """

    model: Path
    data: DataConfig
    samples: int
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TextLook:
    """A mixture that has read text, and is in memory no more.

    Attributes:
        sums: What its experts did, by block.
        loss: Its loss on held-out text, in nats a token.
        held_out: That text.
        number: Samples of it that count.
    """

    sums: Mapping[int, ExpertSums]
    loss: float
    held_out: Samples
    number: int

    @torch.no_grad()
    def loss_of(self, module: Any) -> float:
        """Returns the mean cross-entropy of a model on the held-out text, in nats a token."""
        total, count = 0.0, 0
        for tokens_BS in _batches(self.held_out, min(self.number, self.held_out.samples_per_epoch)):
            logits_BSV = module(input_ids=tokens_BS[:, :-1]).logits
            targets = tokens_BS[:, 1:].flatten()
            loss = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets, reduction="sum")
            total, count = total + float(loss), count + targets.numel()
        return total / count

    @torch.no_grad()
    def require_same(self, module: Any, unread: Unread) -> None:
        """Compares a model with what the class of files makes of them, on held-out text.

        Raises:
            ExactnessError: It is something else.
        """
        tokens_BS = next(_batches(self.held_out, 2))[:, :-1]
        theirs = ReadBack(unread, 0).model(input_ids=tokens_BS).logits
        drift = logit_drift(theirs, module(input_ids=tokens_BS).logits)
        if not agree(drift, torch.float32):
            raise ExactnessError(
                f"the files in {unread.folder} do not compute what was made: logits differ by "
                f"{drift.relative:.2e} of the largest, and at most {TOLERANCES[torch.float32]:.0e} is allowed"
            )


@torch.no_grad()
def look_at_text(
    request: TextRequest, mixture: SourceMixture, cache: Path, log: Callable[[str], None]
) -> TextLook:
    """Runs text through a mixture, which is held in memory in fp32 meanwhile.

    Args:
        request: Mixture and text.
        mixture: The mixture, opened.
        cache: Folder of token files.
        log: Takes lines on the progress.

    Raises:
        ModelError: It does not fit into memory.
        DataError: The text cannot be had.
    """
    folder, trust = request.model, request.trust_remote_code
    if not fits(folder):
        rule = "it does not fit into this machine's free memory in fp32, which looking at text needs"
        raise ModelError.one("MODEL", str(folder), rule, "Take a machine with more memory.")
    size = vocabulary_size(folder, trust_remote_code=trust)
    data = load_data(request.data, folder, cache, size, log, trust_remote_code=trust)
    layers = len(mixture.spec.moe_blocks)
    model = materialize(mixture_model(mixture))
    log(f"looking: {request.samples} samples of {data.train.seq_len} tokens through {layers} MoE layers")
    sums = gather_sums(model, (tokens_BS[:, :-1] for tokens_BS in _batches(data.train, request.samples)))
    look = TextLook(sums, 0.0, data.validation, request.samples)
    loss = look.loss_of(model.module)
    released = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    del model
    collect(released)
    return TextLook(sums, loss, data.validation, request.samples)


def _batches(samples: Samples, number: int) -> Iterator[Tensor]:
    for start in range(0, number, _BATCH):
        yield torch.from_numpy(samples.batch(start, min(_BATCH, number - start)))
