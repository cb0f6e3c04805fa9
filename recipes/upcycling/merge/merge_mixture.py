"""Merges a mixture's experts: looks at text, groups, mixes, writes, and says what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe.errors import ModelError
from recipes.models.export.spec import MoESpec
from recipes.models.families.open_mixture import open_mixture
from recipes.models.families.source_mixture import SourceMixture
from recipes.upcycling.merge.methods import MergeMethod, merge_methods
from recipes.upcycling.prune.choose_experts import choose_experts
from recipes.upcycling.prune.criteria import criteria
from recipes.upcycling.prune.prune_mixture import loss_of_written
from recipes.upcycling.prune.pruned_files import require_prunable, write_pruned
from recipes.upcycling.reduce.expert_sums import ExpertSums
from recipes.upcycling.reduce.mix_experts import Weights, mix_experts, read_expert
from recipes.upcycling.reduce.text_look import TextRequest, look_at_text

#: Block -> expert that stays -> experts that it is mixed of, itself first.
Groups = Mapping[int, Mapping[int, list[int]]]


@dataclass(frozen=True)
class Merged:
    """A mixture whose experts were merged.

    Attributes:
        out: Folder that was written.
        groups: Experts of each group by block, that whose router row stays first.
        num_experts: Experts of a layer before.
        residuals: By block, squared distance of experts from the first of their group over the first's
            square, mean over groups of several: as they are, and once neurons are in one order.
        loss_before: Loss of the source on held-out text, in nats a token.
        loss_after: Loss of what was written.
        total_bytes: Bytes of its tensors.
    """

    out: Path
    groups: dict[int, list[list[int]]]
    num_experts: int
    residuals: dict[int, tuple[float, float]]
    loss_before: float
    loss_after: float
    total_bytes: int


def merge(
    source: TextRequest,
    keep: int,
    method: str,
    cache: Path,
    out: Path,
    log: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Merges experts of a mixture into a folder of the same class.

    Args:
        source: The mixture, and text to look at.
        keep: Experts that each layer keeps.
        method: Name of the method.
        cache: Folder of token files.
        out: Folder to write.
        log: Takes lines on the progress.

    Raises:
        ModelError: It is no mixture that Graft knows, its router has no row or logit for each expert, or it
            does not fit into memory.
        ConfigError: Its class cannot have so many experts.
        ExactnessError: What was written does not compute what it should.
    """
    trust = source.trust_remote_code
    mixture = open_mixture(source.model, trust_remote_code=trust)
    require_prunable(mixture, keep)
    _require_rows(mixture)
    look, chosen = look_at_text(source, mixture, cache, log), merge_methods()[method]
    groups = group_experts(mixture.spec.moe_blocks, look.sums, chosen, keep)
    mixer = _Mixer(mixture, groups, look.sums, chosen)
    after: list[float] = []
    total = write_pruned(
        mixture,
        {index: sorted(found) for index, found in groups.items()},
        out,
        lambda folder: after.append(loss_of_written(look, folder, trust_remote_code=trust)),
        mixer.mixed,
        trust_remote_code=trust,
    )
    members = {index: [found[first] for first in sorted(found)] for index, found in groups.items()}
    E = mixture.spec.moe_blocks[0].num_experts
    return Merged(out, members, E, mixer.means(), look.loss, after[0], total)


def group_experts(
    blocks: tuple[MoESpec, ...], sums: Mapping[int, ExpertSums], method: MergeMethod, keep: int
) -> Groups:
    """Returns groups of experts: the most used ones stay, and every other joins that which is most alike."""
    kept = choose_experts(blocks, sums, criteria()["usage"], keep, seed=0)
    groups: dict[int, dict[int, list[int]]] = {}
    for moe in blocks:
        stay = kept[moe.index]
        likeness_EE = method.likeness_EE(sums[moe.index], _rows(moe))
        found = groups[moe.index] = {first: [first] for first in stay}
        for expert in set(range(moe.num_experts)) - set(stay):
            found[stay[int(likeness_EE[expert, stay].argmax())]].append(expert)
    return groups


def _rows(moe: MoESpec) -> Tensor:
    rows_ED = moe.router.rows_ED()
    assert rows_ED is not None, f"{moe.router.name} has no rows, which is refused before"
    return rows_ED.detach()


def _require_rows(mixture: SourceMixture) -> None:
    moe = mixture.spec.moe_blocks[0]
    if moe.router.rows_ED() is None:
        rule = f"its router, {moe.router.name}, has no rows by which experts are alike"
        raise ModelError.one("MODEL", str(mixture.files.folder), rule, "graft prune needs none.")


class _Mixer:
    """Mixes the experts of a group, weighted by the tokens that are routed to them."""

    def __init__(
        self,
        mixture: SourceMixture,
        groups: Groups,
        sums: Mapping[int, ExpertSums],
        method: MergeMethod,
    ) -> None:
        self._mixture, self._groups, self._sums, self._method = mixture, groups, sums, method
        self._residuals: dict[int, list[tuple[float, float]]] = {index: [] for index in groups}

    def mixed(self, moe: MoESpec, expert: int) -> Weights | None:
        """Returns the weights of a group, by the expert that stays; None for a group of one."""
        members = self._groups[moe.index][expert]
        if len(members) == 1:
            return None
        counts = self._sums[moe.index].counts_E[members]
        shares = counts / counts.sum() if counts.any() else counts + 1 / len(members)
        experts = (read_expert(self._mixture, moe, member) for member in members)
        found = mix_experts(experts, shares.tolist(), aligns=self._method.aligns)
        self._residuals[moe.index].append((found.before, found.after))
        return found.weights

    def means(self) -> dict[int, tuple[float, float]]:
        """Returns the means of what was mixed, by block."""
        return {
            index: (sum(a for a, _ in rows) / max(1, len(rows)), sum(b for _, b in rows) / max(1, len(rows)))
            for index, rows in self._residuals.items()
        }
