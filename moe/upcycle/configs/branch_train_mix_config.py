"""Options of `moe.upcycle.branch_train_mix`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.errors import Mistake
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape


@dataclass(frozen=True)
class BranchTrainMixConfig(UpcycleConfig):
    """Config of `BranchTrainMix`."""

    name: Literal["branch_train_mix"] = "branch_train_mix"
    sources: list[str] = field(default_factory=list)
    """Folders of the branches: dense checkpoints with the shape and tokenizer of ``dense``, the seed."""
    keep_seed: bool = True
    """Use the seed as a source of experts and of the mean, too."""

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires branches, and equally many experts of each."""
        if not self.sources:
            rule = "there is nothing to mix"
            remedy = (
                "List the folders of models that were trained on from the dense one, or take upcycle=copy."
            )
            return [Mistake("upcycle.sources", [], rule, remedy)]
        models = len(self.sources) + int(self.keep_seed)
        if self.num_experts % models:
            rule = f"it does not divide over {models} dense models"
            return [Mistake("upcycle.num_experts", self.num_experts, rule, f"Set a multiple of {models}.")]
        return []

    @property
    def source_folders(self) -> tuple[str, ...]:
        """The branches."""
        return tuple(self.sources)
