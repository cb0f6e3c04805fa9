"""Gives a process a folder of its own for the code of checkpoints, which transformers copies and imports."""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import shutil
import sys
import tempfile

from moe.errors import DiskError

_PACKAGE = "transformers_modules"


@functools.cache
def private_code_folder() -> str:
    """Makes transformers copy the code of checkpoints into a folder of this process, and returns the folder.

    Its own is one folder for all processes of a user: a rank could import a file that another is still
    copying, and a home that may not be written to holds none. The folder lies below ``HF_MODULES_CACHE``
    where that is set, else among temporary files, and is removed when the process ends.

    Raises:
        DiskError: No folder can be made.
    """
    from transformers import dynamic_module_utils

    place = os.environ.get("HF_MODULES_CACHE") or None
    try:
        if place is not None:
            os.makedirs(place, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="graft-code-", dir=place)
    except OSError as error:
        rule = f"no folder can be made in it for a copy of the code ({error.strerror})"
        shown = place or tempfile.gettempdir()
        raise DiskError.one(
            "HF_MODULES_CACHE", shown, rule, "Name a folder that you may write to."
        ) from error
    atexit.register(_remove, folder, os.getpid())
    # What was imported from the other folder stays usable; its packages would hide those of the new one.
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    dynamic_module_utils.HF_MODULES_CACHE = folder
    return folder


def _remove(folder: str, owner: int) -> None:
    """Removes the folder, but not in a process that was forked from its owner."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
