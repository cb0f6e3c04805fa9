"""Options of `moe.routers.skywork`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs.linear_config import LinearRouterConfig
from moe.types import unless

# Options of the coefficient that follows the drop rate.
_ADAPTIVE = ("sensitivity", "momentum", "balance_coef_max", "capacity_factor")


@dataclass(frozen=True)
class SkyworkConfig(LinearRouterConfig):
    """Config of `SkyworkRouter`. ``balance_coef`` is the coefficient's initial value; 0: no loss."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["skywork"] = "skywork"
    bias: bool = True
    """Learn a bias for each expert beside the projection, from 0; the report's router has one."""
    balance_form: Literal["squares", "switch"] = "squares"
    """``squares``: the report's ``sum_e (1/E - P_e)^2`` with P the mean probabilities (Eq. 4). ``switch``:
    the Switch loss, which counts choices."""
    logit_scale: float = 1.0
    """Lambda: standard deviation of a token's logits after normalisation; larger is sharper."""
    renormalise: bool = True
    """Divide the selected probabilities by their sum."""
    adaptive: bool = True
    """Let the balance coefficient follow the drop rate, layer by layer."""
    sensitivity: float = 0.2
    """Xi: the target of the coefficient per unit of drop rate."""
    momentum: float = 0.99
    """Beta: share of the old coefficient that a step keeps."""
    balance_coef_max: float = 0.01
    """Upper bound on the target."""
    capacity_factor: float = 1.0
    """Capacity, in units of even load, above which a slot counts as dropped; no slot really is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k != 1 or not self.renormalise,
                "top_k",
                "the only weight is then always 1, and the router gets no gradient from the loss",
                "Set router.renormalise=false, or top_k to 2 or more.",
            ),
            *(
                (getattr(self, name) > 0, name, "it is positive", "Set it above 0; 1 is usual.")
                for name in ("logit_scale", "capacity_factor")
            ),
            *(
                (getattr(self, name) >= 0, name, "it is not negative", "Set it to 0 or more.")
                for name in ("sensitivity", "balance_coef_max")
            ),
            (
                0 <= self.momentum < 1,
                "momentum",
                "the coefficient would never move, or run away",
                "Set it from 0 to below 1; 0.99 is the paper's.",
            ),
        )

    def check(self, num_experts: int) -> Mistake | None:
        """Rejects E = 2: two normalised logits are +lambda and -lambda whatever the token is."""
        if found := super().check(num_experts):
            return found
        if num_experts == 2:
            rule = (
                "two normalised logits are always +logit_scale and -logit_scale, so that the router's "
                "weights are constants"
            )
            remedy = "Set upcycle.num_experts to 3 or more, or use router=topk."
            return Mistake("name", self.name, rule, remedy)
        return None

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return (
            super().idle()
            | unless(self.balance_coef > 0, "balance_coef is 0", "balance_form", "adaptive", *_ADAPTIVE)
            | unless(self.adaptive, "adaptive is off", *_ADAPTIVE)
        )
