"""Sentences about what the operating system refuses: memory, room, names, permissions, descriptors.

Commands end with them instead of a traceback, whichever line of ours or of a library's met the refusal.
"""

from __future__ import annotations

import errno
import os
import traceback
from dataclasses import dataclass

from recipes.runtime.machine_memory import LimitError, is_out_of_memory
from recipes.runtime.source_root import SOURCE_ROOT, is_ours

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Refusals that name a file; errors of sockets and processes are none of them.
_OF_FILES = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY),
    *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ETXTBSY, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP),
)
# Limits of the process (``ulimit -f``, ``ulimit -n``), which name none.
_LIMITS = (errno.EFBIG, errno.EMFILE, errno.ENFILE)
_NO_HOME = "Could not determine home directory"
_LONGEST = 300


@dataclass(frozen=True)
class Remedies:
    """Remedies of a command, as sentences.

    Attributes:
        memory: For a lack of memory.
        limit: For a limit on the process's memory.
        full: For a disk without room.
        file: For a file or folder that cannot be used.
    """

    memory: str
    limit: str
    full: str
    file: str


def system_sentence(error: BaseException, remedies: Remedies) -> tuple[str, int] | None:
    """Returns a sentence about a refusal of the system, and the exit code; None for other errors."""
    if isinstance(error, LimitError):
        return f"{error}. {remedies.limit}", 1
    if is_out_of_memory(error):
        cause = str(error).strip().partition("\n")[0] or "memory is used up"
        return f"not enough memory, in {place_of(error)}: {cause}. {remedies.memory}", 1
    if isinstance(error, RuntimeError) and _NO_HOME in str(error):
        return f"a path begins with ~ and the name of a user that this machine lacks. {remedies.file}", 2
    if not isinstance(error, OSError):
        return None
    name = "" if error.filename is None else _shown(error.filename)
    if error.errno in _FULL:
        return f"no space left on the disk{f' for {name}' if name else ''}. {remedies.full}", 2
    if error.errno in _LIMITS or (error.errno in _OF_FILES and name):
        subject = f"{name}: {error.strerror}" if name else error.strerror
        return f"{subject}, in {place_of(error)}. {remedies.file}", 2
    return None


def place_of(error: BaseException) -> str:
    """Returns the innermost line of ours in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if is_ours(frame.filename)]
    frame = (ours or frames)[-1]
    return f"{os.path.relpath(frame.filename, SOURCE_ROOT)}:{frame.lineno} {frame.name}"


def _shown(path: object) -> str:
    """Returns a path in one line, cut where it is long."""
    text = ascii(str(path))[1:-1] if not str(path).isprintable() else str(path)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"
