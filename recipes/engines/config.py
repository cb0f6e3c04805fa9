"""Options that engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe.errors import Mistake, Rule, require
from moe.types import Config
from recipes.runtime.extras import EXTRAS, check_extra
from recipes.runtime.gpu_absence import lacks_gpu

if TYPE_CHECKING:
    from moe.routers.configs import RouterConfig
    from recipes.engines.optim.config import OptimConfig
    from recipes.engines.run_options import RunOptions

# OpenMP ends the process without a word where the system has no room for its threads.
_MOST_THREADS = 4096
#: Mistake of an engine's options on a machine without GPU.
NO_GPU = Mistake(
    "device", "cuda", "torch sees no GPU", "Set engine.device=cpu, or install a CUDA build of torch."
)


@dataclass(frozen=True)
class EngineConfig(Config):
    """Base of the engines' configs, whose name picks the engine.

    Its checks need options alone; `recipes.engines.base.Engine` has those of devices and models.
    """

    name: str
    """The engine's name, as in ``conf/engine/NAME.yaml``."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that see the same samples; by default they are neighbours, see `Engine.data_rank`."""
        return 1

    def check(self, world_size: int) -> Mistake | None:
        """Returns the mistake that keeps so many ranks from being laid out; None if they can.

        The path is relative to this config. An engine whose library is an extra has the extra's name.
        """
        if self.name not in EXTRAS:
            return None
        return check_extra(self.name, "name", self.name, "set engine=native")

    def check_moe(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Returns the reasons why the engine cannot train an MoE of this size under this router."""
        return []

    def check_optimizer(self, optim: OptimConfig) -> list[Mistake]:
        """Returns the reasons why the engine cannot train with this optimizer."""
        return []

    def check_run(self, run: RunOptions) -> list[Mistake]:
        """Returns the reasons why the engine cannot run with the other options of a run."""
        return []


@dataclass(frozen=True)
class ProcessConfig(EngineConfig):
    """Options of a `ProcessEngine`."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products. Master weights, router and loss are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: GPUs if there are any."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of each rank; ``auto``: on CPUs, the cores divided by the ranks of this machine."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are sharded; tokens travel to them. 1: every rank holds all."""

    def __post_init__(self) -> None:
        require(self, *self.rules())

    def rules(self) -> list[Rule]:
        """Returns the rules of the options."""
        return [
            (
                self.threads == "auto" or 1 <= self.threads <= _MOST_THREADS,
                "threads",
                f"must be 1 to {_MOST_THREADS}",
                "Or leave it at auto.",
            ),
            (
                self.expert_parallel >= 1,
                "expert_parallel",
                "must be at least 1",
                "Give 1 for experts on every rank.",
            ),
        ]

    def check(self, world_size: int) -> Mistake | None:
        """Requires ranks that divide as configured, and no GPU where it is sure that there is none."""
        found = super().check(world_size) or self.check_dims(world_size)
        return NO_GPU if found is None and self.device == "cuda" and lacks_gpu() else found

    def check_dims(self, world_size: int) -> Mistake | None:
        """Returns the dimension that the ranks do not divide by; None if they divide by all."""
        return dims_mistake(self, world_size, "expert_parallel")

    def check_moe(self, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """Requires experts that divide over the expert-parallel ranks."""
        ranks = self.expert_parallel
        if ranks == 1:
            return []
        mistakes = []
        if num_experts % ranks:
            rule = f"the {num_experts} experts of upcycle.num_experts do not divide over {ranks} ranks"
            remedy = f"Set a divisor of {num_experts}, or another upcycle.num_experts."
            mistakes.append(Mistake("engine.expert_parallel", ranks, rule, remedy))
        if router.reads_experts:
            rule = f"router={router.name} reads the weights of all experts, and no rank holds them all"
            remedy = "Set engine.expert_parallel=1, or choose another router."
            mistakes.append(Mistake("engine.expert_parallel", ranks, rule, remedy))
        return mistakes

    def is_on_cpu(self) -> bool:
        """Returns True where it is known without torch that the run is on CPUs."""
        return self.device == "cpu" or (self.device == "auto" and lacks_gpu())

    def device_type(self) -> str:
        """Returns ``cpu`` or ``cuda``."""
        if self.device != "auto" or self.is_on_cpu():
            return "cpu" if self.device == "auto" else self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def dims_mistake(
    config: EngineConfig, ranks: int, *names: str, whose: str | None = None, groups: int = 1
) -> Mistake | None:
    """Returns the first option whose groups the ranks do not divide into; None if they divide into all.

    Args:
        config: The engine's options.
        ranks: Number of ranks.
        names: Options that are sizes of groups.
        whose: The ranks in words, where they are not all of the run's.
        groups: How often the run has so many ranks.
    """
    for name in names:
        value = getattr(config, name)
        if ranks % value:
            rule = f"{whose or f'{ranks} ranks'} do not divide into groups of {value}"
            remedy = f"Set a divisor of {ranks}, or start a multiple of {value * groups} ranks."
            return Mistake(name, value, rule, remedy)
    return None
