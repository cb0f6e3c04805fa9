"""Options of the experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.errors import choose, require
from moe.experts.lora_config import LoraConfig
from moe.registry import declared_names
from moe.types import Config


@dataclass(frozen=True)
class ExpertsConfig(Config):
    """Config of the experts' computation and training."""

    backend: str = "auto"
    """A back end of `kernels.expert_mlp`, or ``auto``: chosen by device, dtype and shape, on a CPU also by
    rows."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank factors that train instead of the experts' weights."""

    def __post_init__(self) -> None:
        if self.backend == "auto":
            return
        # Back ends are torch code, and their names text: see `kernels.expert_mlp.BACKENDS`.
        names = ["auto", *declared_names("kernels", "*/*.py")]
        require(self, (self.backend in names, "backend", "is no back end", choose(self.backend, names)))
