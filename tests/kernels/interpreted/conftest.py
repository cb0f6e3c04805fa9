"""Tests that run kernels in Triton's interpreter, which is chosen when the kernels are imported.

`tests.kernels.test_kernels_interpreted` starts them in a process of their own.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
