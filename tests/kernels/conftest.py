"""Quickens Triton's interpreter where it is at work."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.quick_interpreter import install

    install()
