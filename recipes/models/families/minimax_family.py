"""MiniMax-Text-01 (arXiv 2501.08313): Mixtral's MoE layer in blocks with lightning attention."""

from __future__ import annotations

from recipes.models.families.mixtral_family import MixtralFamily


class MiniMaxFamily(MixtralFamily):
    """`MiniMaxSparseMoeBlock`."""

    name = "minimax"
    title = "MiniMax-01"
    block_class = "MiniMaxSparseMoeBlock"
