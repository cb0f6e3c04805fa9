"""Which blocks of a decoder each stage of a pipeline holds; imports neither torch nor megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.errors import Mistake
from recipes.engines.megatron.gpt_shape import read_shape


def blocks_of_stages(blocks: int, stages: int) -> list[range]:
    """Consecutive blocks, stage by stage, as many each as any other or one more.

    The first stages have the one more: the last has the head as well.
    """
    each, more = divmod(blocks, stages)
    ends = [(stage + 1) * each + min(stage + 1, more) for stage in range(stages)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def megatron_layout(blocks: int, stages: int) -> list[list[str]] | None:
    """The same in Megatron's words; None where there is one stage."""
    if stages == 1:
        return None
    layout = [["decoder"] * len(held) for held in blocks_of_stages(blocks, stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def stage_mistakes(config: Mapping[str, Any], stages: int) -> list[Mistake]:
    """Why a decoder of the families of `recipes.engines.megatron.gpt_shape` cannot be cut into so many
    stages.

    Args:
        config: The content of its ``config.json``.
        stages: Of the pipeline.
    """
    blocks = read_shape(config).layers
    if blocks >= stages:
        return []
    rule = f"the dense model's {blocks} blocks do not suffice for so many stages"
    return [Mistake("engine.pipeline_parallel", stages, rule, f"Set {blocks} or less.")]
