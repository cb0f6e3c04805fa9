"""Names the tokens over which a balance loss counts."""

from __future__ import annotations

from typing import Literal

BalanceScope = Literal["micro_batch", "sequence", "global_batch"]
