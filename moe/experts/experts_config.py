"""Options of the experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.errors import require
from moe.experts.lora_config import LoraConfig
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
        # Back ends are torch code: a config that names none does not import it.
        from kernels.expert_mlp import BACKENDS

        require(
            self,
            (
                self.backend in BACKENDS,
                "backend",
                "is no back end",
                f"Choose auto, {', '.join(sorted(BACKENDS))}.",
            ),
        )
