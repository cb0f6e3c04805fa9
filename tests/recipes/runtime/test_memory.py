"""The most memory that a process has held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipes.runtime.machine_memory import peak_resident_bytes

_PRINT = "from recipes.runtime.machine_memory import peak_resident_bytes as p; print(p())"
_MIB = 2**20


def test_what_was_held_counts_after_it_is_gone() -> None:
    script = f"x = bytearray(300 * {_MIB}); del x; {_PRINT}"
    assert 300 * _MIB < _printed(script) < 400 * _MIB


def test_a_large_parent_does_not_count() -> None:
    script = (
        f"import subprocess, sys; x = bytearray(300 * {_MIB});"
        f"subprocess.run([sys.executable, '-c', {_PRINT!r}], check=True)"
    )
    assert _printed(script) < 100 * _MIB


def test_without_the_systems_status_there_is_still_a_figure(tmp_path: Path) -> None:
    assert peak_resident_bytes(tmp_path / "none") >= _MIB


def _printed(script: str) -> int:
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout)
