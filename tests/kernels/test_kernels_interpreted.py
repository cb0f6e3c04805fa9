"""Starts the tests of the Triton back end under its interpreter, in a process of their own.

Whether Triton interprets is decided when the kernels are imported, so it cannot be switched here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.patience import patience

_FILES = ("interpreted", "test_kernels_contract.py", "test_kernels_precision.py")
# What is left out has a smaller counterpart in `interpreted/`: the interpreter takes a millisecond a step.
_SHARED = (
    "triton and ((test_kernels_contract and not frozen and not several)"
    " or (twice and not (float16 and biased) and not (low and (bfloat16 or float32))))"
)


@pytest.mark.slow
def test_the_triton_path_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/kernels/{file}" for file in _FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-k", f"interpreted or ({_SHARED})"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(570),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
