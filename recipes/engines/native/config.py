"""Options of the native engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import Mistake, Rule
from recipes.engines.config import ProcessConfig, dims_mistake
from recipes.engines.run_options import model_config

if TYPE_CHECKING:
    from recipes.engines.run_options import RunOptions

_WAYS = "engine.tensor_parallel"


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
        """Requires dense attention under tensor parallelism, with heads that divide over the ranks."""
        if self.tensor_parallel == 1:
            return []
        if run.attention is not None:
            rule, remedy = "attention experts do not support tensor parallelism", "Set 1, or attention=none."
            return [Mistake(_WAYS, self.tensor_parallel, rule, remedy)]
        dense = model_config(run)
        return [] if dense is None else head_mistakes(dense, self.tensor_parallel)


def head_mistakes(dense: Mapping[str, Any], ways: int) -> list[Mistake]:
    """Returns the heads of a model that do not divide over tensor-parallel ranks.

    Args:
        dense: The content of its ``config.json``.
        ways: Number of these ranks.
    """
    text = dense.get("text_config") or dense
    heads = text.get("num_attention_heads") or 0
    counts = {"attention": heads, "key-value": text.get("num_key_value_heads") or heads}
    remedy = "Set engine.tensor_parallel=1, or take another model."
    return [
        Mistake(_WAYS, ways, f"the {count} {what} heads do not divide over {ways} ranks", remedy)
        for what, count in counts.items()
        if count % ways
    ]
