"""Options of `moe.upcycle.branch_train_mix`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.upcycle.configs import UpcycleConfig


@dataclass(frozen=True)
class BranchTrainMixConfig(UpcycleConfig):
    """Config of `BranchTrainMix`."""

    name: Literal["branch_train_mix"] = "branch_train_mix"
    sources: list[str] = field(default_factory=list)
    """Folders of the branches: dense checkpoints with the shape and tokenizer of ``dense``, the seed."""
    keep_seed: bool = True
    """Use the seed as a source of experts and of the mean, too."""
