"""What torchrun shows of a failed rank in its summary."""

from __future__ import annotations

import contextlib
import json
import os
import time


def write_error_file(message: str) -> None:
    """Puts a message into the file that torchrun reads; without torchrun there is none."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as stream:
        json.dump({"message": message, "timestamp": str(int(time.time()))}, stream)
