"""Section of the certificates of the exported model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from moe.errors import require
from recipes.config.sections import Section


@dataclass(frozen=True)
class CertifyConfig(Section):
    """Config of the programs in which the exported model is certified once the run has ended."""

    name: ClassVar[str] = "certify"
    programs: list[str] = field(default_factory=list)
    """Programs, such as ``[transformers,vllm,llama.cpp]``. One that fails does not fail the run."""
    vllm: str | None = None
    """Interpreter of an environment with vLLM."""
    llama_cpp: str | None = None
    """Folder of llama.cpp, built."""
    llama_cpp_bin: str | None = None
    """Folder of its programs; null is ``build/bin`` in it."""
    time_limit_s: float = 3600.0
    """Seconds that a command of a program may take."""

    def __post_init__(self) -> None:
        require(self, (self.time_limit_s > 0, "time_limit_s", "must be above 0", "3600 is usual."))
