"""Blocks that `kernels.tune` measured on a GPU: a file by GPU, Triton version and source of the kernels.

A file is read only where GRAFT_TUNED_BLOCKS says so: ``1`` for the one that `kernels.tune` writes, or a path.
A file that is not there, is damaged, or was measured on something else is refused by name: whoever asks for
measured blocks must not get others unawares. Without the variable the table of `kernels.triton.triton_blocks`
holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kernels.triton.triton_blocks import Blocks, Target, bucket, candidates

#: Says whether tuned blocks are used, and whose.
VARIABLE = "GRAFT_TUNED_BLOCKS"
_FORMAT = 1
#: The dtypes that are tuned; products in fp32 have one choice of blocks.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16})

#: By dtype and `kernels.triton.triton_blocks.bucket`.
Tuned = Mapping[str, Mapping[str, Blocks]]


class TunedBlocksError(ValueError):
    """A file of tuned blocks cannot be used; the message names it, and says why and what to do."""


@dataclass(frozen=True)
class Identity:
    """What a measurement holds for.

    Attributes:
        gpu: Its name, as its driver has it.
        capability: ``major * 10 + minor``.
        triton: Version.
        source: Hash of the kernels' source files.
    """

    gpu: str
    capability: int
    triton: str
    source: str

    def path(self) -> Path:
        """Where `kernels.tune` writes: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu).strip("-").lower()
        return Path(home) / "graft" / "blocks" / f"{gpu}-triton-{self.triton}-{self.source[:12]}.json"


@cache
def kernels_hash(folder: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 over the files below a folder that hold kernels."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("triton_*.py")):
        content = path.read_bytes()
        if b"@triton.jit" in content:
            found.update(path.name.encode() + b"\0" + content)
    return found.hexdigest()


def identity_of(device: torch.device) -> Identity:
    """Of a GPU of this machine, with the kernels and the Triton that are installed."""
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return Identity(name, 10 * major + minor, importlib.metadata.version("triton"), kernels_hash())


def tuned_blocks(device: torch.device, dtype: torch.dtype) -> Mapping[str, Blocks]:
    """What `Target.tuned` is on a GPU: empty unless GRAFT_TUNED_BLOCKS asks for more.

    Raises:
        TunedBlocksError: It asks for a file that cannot be used.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish in ("", "0"):
        return {}
    name = next((name for name, one in DTYPES.items() if one == dtype), "")
    return _of_device(wish, device).get(name, {})


@cache
def _of_device(wish: str, device: torch.device) -> Tuned:
    identity = identity_of(device)
    return read(identity.path() if wish == "1" else Path(wish), identity)


def unsupported_reason(device: torch.device) -> str | None:
    """Why the tuned blocks that the environment asks for cannot be used on a GPU, as a clause."""
    try:
        tuned_blocks(device, torch.bfloat16)
    except TunedBlocksError as error:
        return str(error)
    return None


def read(path: Path, identity: Identity) -> Tuned:
    """Reads a file whole, or refuses it.

    Args:
        path: The file.
        identity: What it must have been measured on.

    Raises:
        TunedBlocksError: It does not exist, is no such file, holds for something else, or has blocks that are
            no candidates for this GPU.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _error(path, "does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as failure:
        raise _error(path, f"cannot be read: {failure}") from failure
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _error(path, f"holds no tuned blocks of format {_FORMAT}")
    for key, value in asdict(identity).items():
        if content.get(key) != value:
            raise _error(path, f"holds for {key} {content.get(key)!r}, and here it is {value!r}")
    try:
        return {
            name: _table(part, Target(identity.capability, DTYPES[name]))
            for name, part in content["blocks"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise _error(path, f"is damaged: {failure!r}") from failure


def _table(part: Mapping[str, Any], target: Target) -> dict[str, Blocks]:
    return {at: _blocks(at, entry, target) for at, entry in part.items()}


def _blocks(at: str, entry: Mapping[str, Any], target: Target) -> Blocks:
    """Of one bucket; only what was compiled ahead of time is taken from a file."""
    kind, *sizes = at.split(" ")
    height, columns, depth = map(int, sizes)
    blocks = Blocks(**{key: entry[key] for key in ("m", "n", "k", "warps", "stages")})
    if at != bucket(kind, height, columns, depth) or blocks not in candidates(kind, height, target):
        raise ValueError(f"{at!r} has {blocks}, which are not among the candidates")
    return blocks


def _error(path: Path, why: str) -> TunedBlocksError:
    remedy = f"Measure here with python -m kernels.tune, or unset {VARIABLE}."
    return TunedBlocksError(f"{VARIABLE}: {path} {why}. {remedy}")


def add(path: Path, identity: Identity, found: Tuned, seconds: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds measurements to a file, replacing those of the same buckets; atomic, one process after the other.

    What cannot be used here is written anew.

    Args:
        path: The file.
        identity: What was measured on.
        found: The blocks.
        seconds: By the same keys, what is kept besides for people.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        try:
            old: Tuned = read(path, identity)
            kept = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        except TunedBlocksError:
            old, kept = {}, {}
        blocks: dict[str, dict[str, Any]] = {name: dict(kept[name]) for name in old}
        for name, part in found.items():
            for at, one in part.items():
                entry = {**asdict(one), **seconds.get(name, {}).get(at, {})}
                blocks.setdefault(name, {})[at] = entry
        _replace(path, json.dumps({"format": _FORMAT, **asdict(identity), "blocks": blocks}, indent=1))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
