"""Equal tokens and equal FLOPs: how many steps each arm trains.

A FLOP is counted by the ``exact`` convention of `moe.accounting.flops`, forward and backward; balance losses,
validation and the optimizer are not in it. Letters: D is the dense model's, M the mixture's FLOPs a token.
"""

from __future__ import annotations


def continued_steps(steps: int, dense_flops: float, moe_flops: float) -> int:
    """Steps in which the dense model costs what the mixture has in ``steps``: nearest to ``steps M/D``.

    Args:
        steps: Of the mixture.
        dense_flops: Of training the dense model on a token.
        moe_flops: Of training the mixture on a token.

    Returns:
        The number; never fewer than ``steps``, which the comparison at equal tokens needs.
    """
    return max(steps, round(steps * moe_flops / dense_flops))


def scratch_steps(steps: int, sunk_steps: int, dense_flops: float, moe_flops: float) -> int:
    """Steps of a mixture from scratch with the dense pre-training's FLOPs on top: ``steps + sunk D/M``.

    Args:
        steps: Of the upcycled mixture.
        sunk_steps: Of the dense model before it.
        dense_flops: Of training the dense model on a token.
        moe_flops: Of training the mixture on a token.
    """
    return steps + round(sunk_steps * dense_flops / moe_flops)
