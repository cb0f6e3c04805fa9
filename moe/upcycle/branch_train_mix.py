"""Branch-Train-MiX: experts out of several dense models that began as one (arXiv 2403.07816).

Each branch of a seed model was trained on a domain of its own. Their feed-forward networks become experts,
all other parameters their mean, and the router is new. BAM (arXiv 2408.08274) and Nexus (arXiv 2408.15901)
go further and are not here.

Letters: E experts, F width, S dense models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from moe.errors import Mistake
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan


@dataclass(frozen=True)
class BranchTrainMixConfig(UpcycleConfig):
    """Config of `BranchTrainMix`."""

    name: Literal["branch_train_mix"] = "branch_train_mix"
    sources: list[str] = field(default_factory=list)
    """Folders of the branches: dense checkpoints of the shape and tokenizer of ``dense``, the seed."""
    keep_seed: bool = True
    """Whether the seed is a source as well, of experts and of the mean."""


class BranchTrainMix(UpcycleMethod[BranchTrainMixConfig]):
    """``E / S`` copies of each dense model's network."""

    name = "branch_train_mix"
    config_class = BranchTrainMixConfig

    @property
    def sources(self) -> tuple[str, ...]:
        """The branches."""
        return tuple(self.config.sources)

    @property
    def averaged(self) -> tuple[int, ...]:
        """All that give experts."""
        return tuple(range(0 if self.config.keep_seed else 1, self.num_sources))

    def is_exact(self, router: Router[Any]) -> bool:
        """Never claimed: it is only where all models are the same."""
        return False

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """There must be branches, and equally many experts of each."""
        E, S = self.config.num_experts, len(self.averaged)
        if not self.config.sources:
            rule = "there is nothing to mix"
            remedy = (
                "List the folders of models that were trained on from the dense one, or take upcycle=copy."
            )
            return [Mistake("upcycle.sources", [], rule, remedy)]
        if E % S:
            rule = f"it does not divide over {S} dense models"
            return [Mistake("upcycle.num_experts", E, rule, f"Set a multiple of {S}.")]
        return []

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Expert e out of the model ``e S // E``."""
        E, whole = self.config.num_experts, slice(0, shape.width)
        models = self.averaged
        return LayerPlan(
            tuple(ExpertPlan(shape.width, whole, source=models[e * len(models) // E]) for e in range(E))
        )
