"""Prunes a mixture: looks at text, chooses, writes, and says what it costs on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.models.families.open_mixture import open_mixture
from recipes.upcycling.prune.choose_experts import choose_experts
from recipes.upcycling.prune.criteria import criteria
from recipes.upcycling.prune.pruned_files import require_prunable, write_pruned
from recipes.upcycling.reduce.text_look import TextLook, TextRequest, look_at_text
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize


@dataclass(frozen=True)
class PruneRequest:
    """Request of a user.

    Attributes:
        source: The mixture, and text to look at.
        keep: Experts that each layer keeps.
        criterion: Name of the criterion.
        seed: Seed of criteria that draw.
    """

    source: TextRequest
    keep: int
    criterion: str
    seed: int = 0


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
    source, trust = request.source, request.source.trust_remote_code
    mixture = open_mixture(source.model, trust_remote_code=trust)
    require_prunable(mixture, request.keep)
    look = look_at_text(source, mixture, cache, log)
    blocks, E = mixture.spec.moe_blocks, mixture.spec.moe_blocks[0].num_experts
    criterion = criteria()[request.criterion]
    kept = choose_experts(blocks, look.sums, criterion, request.keep, request.seed)
    counts = {index: look.sums[index].counts_E for index in kept}
    share = {index: float(counts[index][row].sum() / counts[index].sum()) for index, row in kept.items()}
    after: list[float] = []
    total = write_pruned(
        mixture,
        kept,
        out,
        lambda folder: after.append(loss_of_written(look, folder, trust_remote_code=trust)),
        trust_remote_code=trust,
    )
    return Pruned(out, kept, E, share, look.loss, after[0], total)


def loss_of_written(look: TextLook, folder: Path, *, trust_remote_code: bool) -> float:
    """Compares a mixture that was written with its class's own loading; returns its loss on held-out text.

    Raises:
        ExactnessError: They compute different things.
    """
    written = open_mixture(folder, trust_remote_code=trust_remote_code)
    model = materialize(mixture_model(written))
    look.require_same(model.module, written.format.open(folder, trust_remote_code=trust_remote_code))
    return look.loss_of(model.module)
