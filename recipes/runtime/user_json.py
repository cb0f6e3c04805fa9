"""Reads JSON files, a user's or our own that somebody may have damaged since.

Whatever is wrong with one becomes one clause, never a traceback or a hang.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

LARGEST_FILE = 1 << 30
"""Most bytes of a file that is read: the largest indexes and tokenizers have some 100 MB."""


class UserJsonError(ValueError):
    """Error of JSON in a file.

    Attributes:
        place: The file, or its line, as given to the reader.
        clause: The fault, to follow the place: "is not JSON (... at column 3)".
    """

    def __init__(self, place: str, clause: str) -> None:
        self.place, self.clause = place, clause
        super().__init__(clause)

    def __reduce__(self) -> tuple[type[UserJsonError], tuple[str, str]]:
        """Travels between processes by its two texts."""
        return type(self), (self.place, self.clause)


def read_json_text(text: str | bytes, place: str) -> Any:
    """Parses JSON; a byte order mark is skipped, and NaN and Infinity are read as Python writes them.

    Args:
        text: The text, or UTF-8.
        place: The file, or its line; the error carries it.

    Raises:
        UserJsonError: It is not UTF-8 or not JSON, nests too deeply, has an integer of too many digits, or
            gives a field twice with different values.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        return _DECODER.decode(decoded.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        clause = f"is not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        clause = f"is not JSON ({error.msg} at {line}column {error.colno})"
    except RecursionError:
        clause = "nests lists and objects too deeply to be read"
    except _TwiceError as error:
        clause = f"has the field {error.args[0]!r} twice, with different values"
    except ValueError:  # json raises a bare one for int()'s limit only
        clause = f"has an integer of more than {sys.get_int_max_str_digits()} digits"
    raise UserJsonError(place, clause)


def read_json_file(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserJsonError: See `read_json_text`; or the file cannot be read.
    """
    return read_json_text(read_regular(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        UserJsonError: See `read_json_file`; or it holds something else.
    """
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise UserJsonError(str(path), f"holds a {type(value).__name__} instead of a JSON object")
    return value


def read_regular(path: Path) -> bytes:
    """Reads a regular file of at most 1 GiB; a pipe, a device or a folder is not waited for.

    Raises:
        UserJsonError: The file is none, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise UserJsonError(str(path), "is no regular file")
            if found.st_size > LARGEST_FILE:
                raise UserJsonError(str(path), f"holds {found.st_size} bytes, far more than such a file has")
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserJsonError):
            raise
        cause = getattr(error, "strerror", None) or str(error)
        raise UserJsonError(str(path), f"cannot be read ({cause})") from None


class _TwiceError(ValueError):
    """Tells the name of a field that has two values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; json by itself takes the last of several values without a word."""
    built = dict(pairs)
    if len(built) != len(pairs):
        for name, value in pairs:
            if built[name] != value:
                raise _TwiceError(name)
    return built


# Made once: json.loads makes one for every call that has a hook.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)
