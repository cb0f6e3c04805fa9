"""Branch-Train-MiX: experts out of several dense models with a common seed (arXiv 2403.07816).

Each branch of the seed model was trained on a domain of its own. Their feed-forward networks become experts,
all other parameters are averaged, and the router is new. BAM (arXiv 2408.08274) and Nexus (arXiv 2408.15901)
go further and are not implemented.

Letters: E experts, F width, S dense models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.branch_train_mix_config import BranchTrainMixConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan


class BranchTrainMix(UpcycleMethod[BranchTrainMixConfig]):
    """Method that takes ``E / S`` copies of each dense model's network."""

    name = "branch_train_mix"
    config_class = BranchTrainMixConfig

    @property
    def averaged(self) -> tuple[int, ...]:
        """The models that give experts."""
        return tuple(range(0 if self.config.keep_seed else 1, self.num_sources))

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns False: only equal models would make it exact."""
        return False

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Takes expert e from the model ``e S // E``."""
        E, whole = self.config.num_experts, slice(0, shape.width)
        models = self.averaged
        return LayerPlan(
            tuple(ExpertPlan(shape.width, whole, source=models[e * len(models) // E]) for e in range(E))
        )
