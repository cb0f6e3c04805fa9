"""Granite 4: Granite-MoE's layer, with a shared expert beside it, in blocks with Mamba 2."""

from __future__ import annotations

from recipes.models.families.granitemoe_family import GraniteMoEFamily


class GraniteMoEHybridFamily(GraniteMoEFamily):
    """`GraniteMoeHybridMoE`."""

    name = "granitemoehybrid"
    title = "Granite-MoE-Hybrid"
    block_class = "GraniteMoeHybridMoE"
