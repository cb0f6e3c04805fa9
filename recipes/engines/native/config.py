"""Options of the native engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe.errors import Mistake, Rule
from recipes.engines.config import ProcessConfig, dims_mistake

if TYPE_CHECKING:
    from recipes.engines.run_options import RunOptions


@dataclass(frozen=True)
class NativeConfig(ProcessConfig):
    """Options of `NativeEngine`."""

    name: Literal["native"] = "native"
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """``fsdp``: weights, gradients and optimizer state are sharded over the ranks; ``ddp``: replicated."""
    replicas: int = 1
    """Groups of ranks that each hold a whole sharded model (HSDP): weights are gathered within a group, and
    gradients averaged between groups. 1: one group of all ranks."""
    tensor_parallel: int = 1
    """Ranks over which attention heads are sharded. They see the same samples, and each sends its share of
    the tokens to the experts. 1: every rank computes all heads."""
    compile: bool = False
    """Compile each block with torch.compile; the MoE layers stay outside of the compiled graphs."""

    def rules(self) -> list[Rule]:
        """Returns the rules of the options."""
        sizes = {name: getattr(self, name) for name in ("replicas", "expert_parallel", "tensor_parallel")}
        return [
            *super().rules(),
            (self.replicas >= 1, "replicas", "must be at least 1", "Give 1 for one group of ranks."),
            (
                self.tensor_parallel >= 1,
                "tensor_parallel",
                "must be at least 1",
                "Give 1 for whole attention.",
            ),
            *(
                (
                    value <= 1 or self.strategy != "ddp",
                    name,
                    "must be 1 under strategy=ddp, which keeps all weights on every rank",
                    "Set engine.strategy=fsdp.",
                )
                for name, value in sizes.items()
            ),
            *(
                (
                    value <= 1 or not self.compile,
                    name,
                    "must be 1 with compile: the two together are not proven",
                    "Set engine.compile=false.",
                )
                for name, value in sizes.items()
            ),
        ]

    @property
    def model_parallel_size(self) -> int:
        """Tensor-parallel ranks, which see the same samples."""
        return self.tensor_parallel

    def check_dims(self, world_size: int) -> Mistake | None:
        """Requires ranks that divide into replicas, and those into groups of the other kinds."""
        copies = self.replicas
        if world_size % copies:
            rule = f"{world_size} ranks do not divide into {copies} groups"
            remedy = f"Set a divisor of {world_size}, or start a multiple of {copies} ranks."
            return Mistake("replicas", copies, rule, remedy)
        ranks = world_size // copies
        whose = None if copies == 1 else f"the {ranks} ranks of each of {copies} replicas"
        names = ("expert_parallel", "tensor_parallel")
        return dims_mistake(self, ranks, *names, whose=whose, groups=copies)

    def check_run(self, run: RunOptions) -> list[Mistake]:
        """Rejects attention experts under tensor parallelism."""
        if self.tensor_parallel == 1 or run.attention is None:
            return []
        rule = "attention experts do not support tensor parallelism"
        return [Mistake("engine.tensor_parallel", self.tensor_parallel, rule, "Set 1, or attention=none.")]
