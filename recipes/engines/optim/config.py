"""Options of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.errors import require
from moe.types import Config, unless
from recipes.engines.optim.lr_schedule import ScheduleConfig

#: Groups of parameters, by their purpose; see `recipes.engines.optim.parameter_groups`.
GROUPS = ("router", "experts", "expert_biases", "matrices", "tensors", "head", "embeddings", "vectors")
#: Dependence of Muon's step size on the shape of a matrix.
Adjustment = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True)
class MuonConfig(Config):
    """Settings of Muon, used when ``optim.name`` is ``muon``; see `recipes.engines.optim.muon.StackedMuon`.

    Attributes:
        lr_scale: Muon's learning rate is ``lr`` times this.
        momentum: Interpolation factor of the momentum buffer.
        nesterov: Look ahead by one interpolation.
        ns_steps: Newton-Schulz iterations.
        adjustment: Dependence of the step size on a matrix's shape. With ``match_rms_adamw`` the ``lr`` and
            ``weight_decay`` of AdamW serve Muon unchanged.
    """

    lr_scale: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjustment: Adjustment = "match_rms_adamw"

    def __post_init__(self) -> None:
        require(
            self,
            (self.lr_scale >= 0, "lr_scale", "must be 0 or more", "Give 1 for the common lr."),
            (0 <= self.momentum < 1, "momentum", "must be in [0, 1)", "0.95 is usual."),
            (1 <= self.ns_steps < 100, "ns_steps", "must be in [1, 99]", "5 is usual."),
            (
                self.adjustment in ("match_rms_adamw", "original"),
                "adjustment",
                "is unknown",
                "Choose match_rms_adamw or original.",
            ),
        )


@dataclass(frozen=True)
class FrozenConfig(Config):
    """First phase of a run, in which some parameters do not train.

    With the experts frozen, a fresh router learns to use experts that were split well, before they change
    (expert-frozen tuning, arXiv 2512.02351). Gradients are computed all the same.

    Attributes:
        steps: Number of updates; 0 for no such phase.
        groups: Frozen groups, of `recipes.engines.optim.config.GROUPS`.
    """

    steps: int = 0
    groups: tuple[str, ...] = ("experts", "expert_biases")

    def __post_init__(self) -> None:
        unknown = [group for group in self.groups if group not in GROUPS]
        require(
            self,
            (self.steps >= 0, "steps", "must be at least 0", "Give 0 for no frozen stage."),
            (not unknown, "groups", f"{unknown} are unknown", f"Choose of {', '.join(GROUPS)}."),
            (set(self.groups) != set(GROUPS), "groups", "nothing is left to train", "Leave one out."),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.steps > 0, "steps is 0, and nothing is frozen", "groups")


@dataclass(frozen=True)
class OptimConfig(Config):
    """Settings of the optimizer.

    Attributes:
        name: ``adamw``, or ``muon``: Muon for the hidden matrices and the experts, AdamW for the rest.
        lr: Learning rate at the top of the schedule.
        router_lr_scale: Factor of the routers' learning rate.
        expert_lr_scale: Factor of the routed experts' learning rate.
        weight_decay: Decoupled weight decay; see `build_optimizer` for the parameters that decay.
        betas: Betas of AdamW.
        eps: Epsilon of AdamW.
        clip_norm: Largest norm of the gradients of all parameters together; None does not clip.
        frozen: Groups that the first updates leave alone.
        muon: Settings of Muon.
        schedule: Learning-rate schedule.
        start_from: Folder of a checkpoint of the dense model's own training (``RUN/cpt/checkpoints/step-N``),
            whose optimizer state the expert copies start with; None starts without state. See
            `recipes.upcycling.optim_start`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    router_lr_scale: float = 1.0
    expert_lr_scale: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    start_from: str | None = None

    def __post_init__(self) -> None:
        scales = {"router_lr_scale": self.router_lr_scale, "expert_lr_scale": self.expert_lr_scale}
        betas_hold = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(
            self,
            (self.name in ("adamw", "muon"), "name", "is no optimizer", "Choose adamw or muon."),
            (self.lr >= 0, "lr", "must be 0 or more", "3e-4 is a usual start."),
            *(
                (value >= 0, key, "must be 0 or more", "Give 1 for the common lr.")
                for key, value in scales.items()
            ),
            (self.weight_decay >= 0, "weight_decay", "must be 0 or more", "Give 0 for none."),
            (betas_hold, "betas", "must be two numbers in [0, 1)", "(0.9, 0.95) is usual."),
            (self.eps > 0, "eps", "must be above 0", "1e-8 is usual."),
            (
                self.clip_norm is None or self.clip_norm > 0,
                "clip_norm",
                "must be above 0",
                "Give null to not clip.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.name == "muon", "optim.name is not muon", "muon")
