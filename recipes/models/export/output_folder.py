"""Output folders of commands: claimed by one process, written under a temporary name, whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import ConfigError, DiskError
from recipes.runtime.atomic import disk_mistake, replace_folder, sync_contents
from recipes.runtime.claim import claim, lock_beside


@contextmanager
def output_folder(
    out: Path, path: str = "--out", *, replaces: bool = False, resumes: bool = False
) -> Iterator[Path]:
    """Yields the folder to write to; on leaving it gets its name, after an error it does not.

    Args:
        out: The output.
        path: Flag that names it.
        replaces: Whether an older folder of that name is replaced; else it must not exist.
        resumes: Whether what an interrupted process has left is kept, also after an error.

    Raises:
        ConfigError: The output exists already.
        InUseError: Another process is writing it.
        DiskError: The folder cannot be written.
    """
    if not replaces:
        refuse_existing(out, path)
    with claim(lock_beside(out), path, out):
        if not replaces:
            refuse_existing(out, path)
        temporary = out.with_name(f".tmp-{out.name}")
        with _refusals(out):
            _require_folder(temporary)
            if not resumes:
                shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if not replaces:
                refuse_existing(out, path)
            with _refusals(out):
                sync_contents(temporary)
                replace_folder(temporary, out, out.with_name(f".old-{out.name}"))
        except BaseException:
            if not resumes or not any(temporary.iterdir()):
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_existing(out: Path, path: str) -> None:
    """Refuses an output that is there already.

    Raises:
        ConfigError: It is.
    """
    if os.path.lexists(out):  # a link that leads nowhere is in the way as well
        raise ConfigError.one(path, str(out), "it exists already", "Give another folder, or delete it.")


def _require_folder(temporary: Path) -> None:
    """Refuses what no earlier process of ours has left: it is somebody's file, or leads to their folder."""
    if os.path.lexists(temporary) and (temporary.is_symlink() or not temporary.is_dir()):
        raise FileExistsError(errno.EEXIST, "a file or link is in the way", str(temporary))


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """Turns the system's answers into errors that name the output."""
    try:
        yield
    except OSError as error:
        raise DiskError([disk_mistake(out, error)]) from error
