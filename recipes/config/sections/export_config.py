"""Section of the exported model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from recipes.config.sections import Section


@dataclass(frozen=True)
class ExportConfig(Section):
    """Config of the export."""

    name: ClassVar[str] = "export"
    dtype: Literal["source", "fp32", "bf16"] = "source"
    """Dtype of the weights in the files; ``source``: that of the dense checkpoint."""
    memory_gib: float = 4.0
    """Memory of rank 0, in GiB, that the fp32 model may take when the export is read back and compared. A
    larger model is read block by block, and generates no sample."""
    try_first: bool = True
    """Whether the model is exported before the first step as well, to a folder that is deleted, and checked:
    what keeps it from being exported is then found before it is trained. A resumed run does it where none
    before has."""

    def __post_init__(self) -> None:
        remedy = "Set 0 to read every model block by block."
        require(self, (self.memory_gib >= 0, "memory_gib", "must be at least 0", remedy))
