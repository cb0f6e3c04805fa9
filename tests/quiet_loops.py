"""Keeps the threads of gloo from spinning, where there is a compiler; see ``quiet_loops.c``.

It takes a sixth less processor time for ranks that share two cores with other tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def quiet(folder: Path) -> dict[str, str]:
    """Compiles the library into a folder.

    Returns:
        Variables under which a process loads it; none where it cannot be had: it changes no result.
    """
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return {}
    library, source = folder / "quiet_loops.so", Path(__file__).with_suffix(".c")
    made = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], capture_output=True)
    return {"LD_PRELOAD": str(library)} if made.returncode == 0 else {}
