"""Options of `moe.routers.noisy_topk`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from moe.routers.configs.linear_config import LinearRouterConfig
from moe.types import unless


@dataclass(frozen=True)
class NoisyTopKConfig(LinearRouterConfig):
    """Config of `NoisyTopKRouter`."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["noisy_topk"] = "noisy_topk"
    balance_coef: float = 0.0
    """Coefficient of the Switch balance loss, which neither source has; 0 leaves it out."""
    form: Literal["shazeer", "vmoe"] = "shazeer"
    """``shazeer``: learned noise ``softplus(x W)``, softmax over the selected logits. ``vmoe``: noise of
    standard deviation 1/E, softmax over all logits before the selection, weights not renormalised."""
    noise_scale: float = 1.0
    """Factor on the noise; 0 turns it off."""
    importance_coef: float = 0.1
    """Coefficient of the squared coefficient of variation of the experts' summed gates."""
    load_coef: float = 0.1
    """Coefficient of the squared coefficient of variation of each expert's expected tokens, were the noise
    redrawn: by the K-th best of the others (``shazeer``), or of all (``vmoe``)."""
    noise_seed: int = 0
    """Seed of the draws; conf/router follows the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.form != "shazeer" or self.top_k != 1,
                "top_k",
                "the only weight is then always 1, and the router gets no gradient from the loss",
                "Set router.form=vmoe, or top_k to 2 or more.",
            ),
            *(
                (getattr(self, name) >= 0, name, "it is not negative", "Set it to 0 or more.")
                for name in ("noise_scale", "load_coef")
            ),
            (
                self.noise_scale != 0 or not self.load_coef,
                "load_coef",
                "the load is an expectation over noise, and there is none",
                "Set router.load_coef=0, or router.noise_scale above 0.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return super().idle() | unless(self.noise_scale > 0, "noise_scale is 0", "noise_seed")
