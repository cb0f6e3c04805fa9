"""Granite-MoE with a shared expert, which stands beside the MoE layer."""

from __future__ import annotations

from recipes.models.families.granitemoe_family import GraniteMoEFamily


class GraniteMoESharedFamily(GraniteMoEFamily):
    """`GraniteMoeSharedMoE`."""

    name = "granitemoeshared"
    title = "Granite-MoE-Shared"
    block_class = "GraniteMoeSharedMoE"
