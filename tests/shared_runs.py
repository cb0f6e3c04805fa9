"""Results that all workers of a session share: the first test that asks for one computes it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests import fork_server

_known: dict[Path, Any] = {}


def shared_folder(name: str) -> Path:
    """Returns a folder that all workers of the session share."""
    fork_server.prepare()
    folder = Path(os.environ[fork_server.FOLDER]) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(do: Callable[..., Any], *args: Any) -> Any:
    """Returns ``do(*args)``, computed by the first worker that asks and read from a file by the others.

    Args:
        do: A function at the top level of a module.
        *args: Picklable arguments.

    Raises:
        AssertionError: Ranks have failed, here or on another worker.
    """
    name = hashlib.sha256(pickle.dumps((do, args))).hexdigest()
    path = shared_folder("results") / name
    if path not in _known:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                try:
                    result = True, do(*args)
                except AssertionError as error:
                    result = False, str(error)
                path.write_bytes(pickle.dumps(result))
        _known[path] = pickle.loads(path.read_bytes())
    succeeded, value = _known[path]
    if not succeeded:
        raise AssertionError(value)
    return value


def on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns by rank what ``fn(*args)`` returns on so many ranks, under torchrun's environment."""
    # It takes seconds to import.
    from tests.distributed_helper import run_ranks

    return once(run_ranks, _call, world_size, fn, args)


def _call(rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank))
    return fn(*args)


class Lazily(Mapping[Any, Any]):
    """Mapping whose values are computed when they are asked for."""

    def __init__(self, keys: Iterable[Any], compute: Callable[[Any], Any]) -> None:
        self._keys = tuple(keys)
        self._compute = compute

    def __getitem__(self, key: Any) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._compute(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
