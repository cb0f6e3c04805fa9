"""Says where this project's code is, a checkout or an installed package, and how other processes run it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""The folder of ``conf`` and the packages: that of ``train.py``, or ``site-packages``."""
PACKAGES = ("kernels", "moe", "recipes", "tools")
_INSTALLED = not (SOURCE_ROOT / "train.py").is_file()
TRAIN = ("-m", "recipes.launch")
"""``train.py`` for an interpreter, or for torchrun."""


def is_ours(filename: str) -> bool:
    """Returns whether a file is one of this project's sources."""
    path = Path(filename)
    if not path.is_relative_to(SOURCE_ROOT):
        return False
    below = path.relative_to(SOURCE_ROOT).parts
    # In a checkout an environment may stand beside the sources; where Graft is installed, all others do.
    return below[0] in PACKAGES if _INSTALLED else "site-packages" not in below


def child_environment() -> dict[str, str]:
    """Returns the environment in which other processes import this code, whatever the working folder holds.

    ``python -m`` imports from the working folder first, and someone's may hold another ``tools`` or ``moe``.
    """
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def interpreter() -> str:
    """Returns the interpreter of other processes; ``PYTHON_EXEC`` overrides it, as for torchrun."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


def torchrun(ranks: int) -> list[str]:
    """Returns the beginning of a command line that starts ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}"]
