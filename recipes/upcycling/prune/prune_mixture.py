"""Prunes a mixture: looks at text, chooses, writes, and says what it costs on held-out text.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moe.errors import ExactnessError, ModelError
from moe.upcycle.equivalence import TOLERANCES, agree, logit_drift
from recipes.data.build_data import load_data
from recipes.data.config import DataConfig
from recipes.data.samples import Samples
from recipes.models.export.read_back import ReadBack
from recipes.models.families.open_mixture import open_mixture
from recipes.models.hf.config_file import vocabulary_size
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.machine_memory import collect
from recipes.upcycling.convert.folder_check import fits
from recipes.upcycling.prune.choose_experts import choose_experts
from recipes.upcycling.prune.criteria import criteria
from recipes.upcycling.prune.expert_sums import gather_sums
from recipes.upcycling.prune.pruned_files import require_prunable, write_pruned
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize

_BATCH = 8  # samples of a forward pass


@dataclass(frozen=True)
class PruneRequest:
    """Request of a user.

    Attributes:
        model: The mixture.
        keep: Experts that each layer keeps.
        criterion: Name of the criterion.
        data: Text, split into what is looked at and what is held out.
        samples: Samples that are looked at, and at most so many that are held out.
        seed: Seed of criteria that draw.
        trust_remote_code: Whether the model may bring its own code.
    """

    model: Path
    keep: int
    criterion: str
    data: DataConfig
    samples: int
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Pruned:
    """A mixture that was pruned.

    Attributes:
        out: Folder that was written.
        kept: Experts that are kept, by block.
        num_experts: Experts of a layer before.
        share: By block, the share of the tokens' expert choices that fell on kept experts.
        loss_before: Loss of the source on held-out text, in nats a token.
        loss_after: Loss of what was written.
        total_bytes: Bytes of its tensors.
    """

    out: Path
    kept: dict[int, list[int]]
    num_experts: int
    share: dict[int, float]
    loss_before: float
    loss_after: float
    total_bytes: int


@torch.no_grad()
def prune(
    request: PruneRequest, cache: Path, out: Path, log: Callable[[str], None] = lambda line: None
) -> Pruned:
    """Prunes a mixture into a folder.

    The mixture is held in memory in fp32 while text runs through it; files are written matrix by matrix.

    Args:
        request: What is asked for.
        cache: Folder of token files.
        out: Folder to write.
        log: Takes lines on the progress.

    Raises:
        ModelError: It is no mixture that Graft knows, its router has no row for each expert, or it does not
            fit into memory.
        ConfigError: Its class cannot have so many experts.
        ExactnessError: What was written does not compute what it should.
    """
    folder, trust = request.model, request.trust_remote_code
    mixture = open_mixture(folder, trust_remote_code=trust)
    require_prunable(mixture, request.keep)
    if not fits(folder):
        rule = "it does not fit into this machine's free memory in fp32, which looking at text needs"
        raise ModelError.one("MODEL", str(folder), rule, "Prune it on a machine with more memory.")
    size = vocabulary_size(folder, trust_remote_code=trust)
    data = load_data(request.data, folder, cache, size, log, trust_remote_code=trust)
    blocks, E = mixture.spec.moe_blocks, mixture.spec.moe_blocks[0].num_experts
    model = materialize(mixture_model(mixture))
    log(f"prune: {request.samples} samples of {data.train.seq_len} tokens through {len(blocks)} MoE layers")
    sums = gather_sums(model, (tokens_BS[:, :-1] for tokens_BS in _batches(data.train, request.samples)))
    before = held_out_loss(model, data.validation, request.samples)
    released = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    del model
    collect(released)
    criterion = criteria()[request.criterion]
    kept = choose_experts(blocks, sums, criterion, request.keep, request.seed)
    share = {
        index: float(sums[index].counts_E[row].sum() / sums[index].counts_E.sum())
        for index, row in kept.items()
    }
    after: list[float] = []

    def check(temporary: Path) -> None:
        written = materialize(mixture_model(open_mixture(temporary, trust_remote_code=trust)))
        _require_same(written, temporary, next(_batches(data.validation, 2))[:, :-1], trust_remote_code=trust)
        after.append(held_out_loss(written, data.validation, request.samples))

    total = write_pruned(mixture, kept, out, check, trust_remote_code=trust)
    return Pruned(out, kept, E, share, before, after[0], total)


@torch.no_grad()
def held_out_loss(model: HFModel, samples: Samples, number: int) -> float:
    """Returns the mean cross-entropy over the first samples, in nats a token."""
    total, count = 0.0, 0
    for tokens_BS in _batches(samples, min(number, samples.samples_per_epoch)):
        logits_BSV = model.module(input_ids=tokens_BS[:, :-1]).logits
        targets = tokens_BS[:, 1:].flatten()
        total += float(functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets, reduction="sum"))
        count += targets.numel()
    return total / count


def _batches(samples: Samples, number: int) -> Iterator[Tensor]:
    for start in range(0, number, _BATCH):
        yield torch.from_numpy(samples.batch(start, min(_BATCH, number - start)))


def _require_same(model: HFModel, folder: Path, tokens_BS: Tensor, *, trust_remote_code: bool) -> None:
    """Compares what was written with what its own class makes of the files."""
    unread = open_mixture(folder, trust_remote_code=trust_remote_code).format.open(
        folder, trust_remote_code=trust_remote_code
    )
    theirs = ReadBack(unread, 0).model(input_ids=tokens_BS).logits
    drift = logit_drift(theirs, model.module(input_ids=tokens_BS).logits)
    if not agree(drift, torch.float32):
        raise ExactnessError(
            f"the files in {folder} do not compute what was pruned: logits differ by {drift.relative:.2e} of "
            f"the largest, and at most {TOLERANCES[torch.float32]:.0e} is allowed"
        )
