"""Reads JSON files that Graft has written, which somebody may have damaged since."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 30


def read_json_object(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Args:
        path: The file.
        most_bytes: Size beyond which no such file is ours.

    Raises:
        OSError: It cannot be opened or read.
        ValueError: It is no regular file, too large, or no JSON object; the message is a clause about it.
    """
    value = parse_json(read_regular(path, most_bytes))
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__} instead of a JSON object")
    return value


def read_regular(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Reads a regular file; a pipe or a device is not waited for. Raises as `read_json_object` does."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"it has {status.st_size} bytes, more than {most_bytes}")
        return file.read()


def parse_json(data: bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: It is none, or nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
