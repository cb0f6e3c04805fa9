"""Rules of low-rank factors that options and shapes tell; it imports no torch."""

from __future__ import annotations

from moe.errors import Mistake
from moe.upcycle.dense_shape import FFNShape
from recipes.config.schema import RunConfig

RANK_PATH = "experts.lora.rank"


def check_low_rank(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Rejects low-rank factors that cannot be, or that would not belong to the exported model.

    Args:
        config: The run.
        shape: Shape of the dense network, where it is known. Experts may be narrower:
            `recipes.models.lora_model` looks at them again.
    """
    rank = config.experts.lora.rank
    if not rank:
        return []
    mistakes = []
    if config.router.reads_experts:
        rule = "it reads the experts' weights, which do not change beside low-rank factors and do on export"
        remedy = "Choose another router, or set experts.lora.rank=0."
        mistakes.append(Mistake("router.name", config.router.name, rule, remedy))
    if config.optim.start_from is not None:
        rule = "it holds the state of weights that do not train beside low-rank factors"
        mistakes.append(
            Mistake("optim.start_from", config.optim.start_from, rule, f"Set null, or {RANK_PATH}=0.")
        )
    if shape is None:
        return mistakes
    unsupported_reason = config.experts.lora.unsupported_reason(shape.model_width, shape.width)
    if unsupported_reason is not None:
        remedy = f"Set {min(shape.model_width, shape.width)} or less; 8 to 64 are usual."
        mistakes.append(Mistake(RANK_PATH, rank, unsupported_reason, remedy))
    return mistakes


def refuse_low_rank(config: RunConfig, who: str) -> list[Mistake]:
    """Rejects low-rank factors in a job that has none.

    Args:
        config: The run.
        who: Reason, as a clause.
    """
    rank = config.experts.lora.rank
    return [Mistake(RANK_PATH, rank, who, "Set it to 0.")] if rank else []
