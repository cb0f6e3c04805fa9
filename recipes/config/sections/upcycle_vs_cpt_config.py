"""Section of the experiment `upcycle_vs_cpt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moe.errors import require
from moe.types import unless
from recipes.config.sections import Section


@dataclass(frozen=True)
class UpcycleVsCPTConfig(Section):
    """Config of the experiment; no other recipe reads it.

    Attributes:
        arms: ``continued`` (the upcycled model and the dense one trained on), ``scratch`` (the MoE model
            from drawn weights), or ``all``.
        sunk_steps: Lengths of dense pre-training whose FLOPs the model from scratch gets on top of
            ``train.steps``, each a run of its own, besides one with none; None: that of the default model
            (``model.steps``), none with a checkpoint.
        scratch_lr: Learning rate of the MoE model from scratch; None: ``optim.lr``, as the other arms.
        init_std: Standard deviation of the experts' weights in the MoE model from scratch.
        batches: Sequences of the decode steps whose serving costs are counted.
    """

    name: ClassVar[str] = "upcycle_vs_cpt"
    arms: Literal["all", "continued", "scratch"] = "all"
    sunk_steps: list[int] | None = None
    scratch_lr: float | None = None
    init_std: float = 0.02
    batches: list[int] = field(default_factory=lambda: [1, 32])

    def __post_init__(self) -> None:
        require(
            self,
            (
                all(steps >= 0 for steps in self.sunk_steps or []),
                "sunk_steps",
                "must be numbers of at least 0",
                "Or leave it at null.",
            ),
            (
                self.scratch_lr is None or self.scratch_lr > 0,
                "scratch_lr",
                "must be above 0",
                "Or leave it at null.",
            ),
            (self.init_std > 0, "init_std", "experts of zeros stay equal", "Set it above 0; 0.02 is usual."),
            (
                len(self.batches) > 0 and all(size >= 1 for size in self.batches),
                "batches",
                "must be numbers of at least 1",
                "Give [1, 32].",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.arms != "continued",
            "arms=continued has no model from scratch",
            "sunk_steps",
            "scratch_lr",
            "init_std",
        )
