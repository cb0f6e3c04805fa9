"""The file from which torchrun reads a failed rank's message for its summary."""

from __future__ import annotations

import contextlib
import json
import os
import time


def write_error_file(message: str) -> None:
    """Writes a message to the file that torchrun reads; does nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as stream:
        json.dump({"message": message, "timestamp": str(int(time.time()))}, stream)
