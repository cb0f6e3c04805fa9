"""Interface of programs that load an exported mixture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe.errors import GraftError, Mistake
from recipes.cap.certify.observation import Observation, Request


class ConsumerError(GraftError):
    """A program could not load an export or compute with it."""


@dataclass(frozen=True)
class Places:
    """Where the programs are that have environments of their own, how long they may take, and what may run.

    Attributes:
        vllm: Python interpreter of the environment that has vLLM.
        llama_cpp: Folder of llama.cpp, with its converter and what was built of it.
        llama_cpp_bin: Folder of its programs.
        seconds: Time that one of their commands may take.
        trust_remote_code: Whether code that the export brings may run in this process.
    """

    vllm: Path | None = None
    llama_cpp: Path | None = None
    llama_cpp_bin: Path | None = None
    seconds: float = 3600.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Consumer(ABC):
    """A program that loads an exported mixture.

    Attributes:
        places: Where programs are.
        log: Takes a line on what is done.
    """

    places: Places
    log: Callable[[str], None]

    #: Name of the program, as ``--in`` and the certificate have it.
    name: ClassVar[str]
    #: Whether it tells the experts of each token, and takes those of another.
    tells_experts: ClassVar[bool] = True

    def check(self) -> Mistake | None:
        """Returns what keeps it from running here; None if it can run."""
        return None

    @abstractmethod
    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        """Loads an export and computes in fp32 what is asked.

        Args:
            folder: The export.
            request: The tokens.
            scratch: Folder for files of its own.

        Raises:
            ConsumerError: The program fails.
        """
