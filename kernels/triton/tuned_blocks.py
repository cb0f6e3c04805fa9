"""Files of blocks that `kernels.tune` measured, one for each GPU model, Triton version and kernel source.

GRAFT_TUNED_BLOCKS selects the file: ``1`` for the one that `kernels.tune` writes, or a path. A file that is
missing, damaged or measured on something else is an error, so that nobody runs other blocks unawares. Without
the variable the table of `kernels.triton.triton_blocks` holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kernels.text_file import write_text
from kernels.triton.triton_blocks import Blocks, Target, bucket, candidates

#: Environment variable that selects the file.
VARIABLE = "GRAFT_TUNED_BLOCKS"
_FORMAT = 1
#: Dtypes that are tuned; products in fp32 have one choice of blocks.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16})

#: Blocks by dtype and `kernels.triton.triton_blocks.bucket`.
Tuned = Mapping[str, Mapping[str, Blocks]]


class TunedBlocksError(ValueError):
    """A file of tuned blocks cannot be used; the message gives path, reason and remedy."""


@dataclass(frozen=True)
class Identity:
    """GPU and software that a measurement holds for.

    Attributes:
        gpu: Name of the GPU, from its driver.
        capability: ``major * 10 + minor``.
        triton: Version of Triton.
        source: Hash of the kernels' source files.
    """

    gpu: str
    capability: int
    triton: str
    source: str

    def path(self) -> Path:
        """Returns the file that `kernels.tune` writes, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu).strip("-").lower()
        return Path(home) / "graft" / "blocks" / f"{gpu}-triton-{self.triton}-{self.source[:12]}.json"


@cache
def kernels_hash(folder: Path = Path(__file__).parents[1]) -> str:
    """Returns the SHA-256 of the files below a folder that define kernels."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("triton_*.py")):
        content = path.read_bytes()
        if b"@triton.jit" in content:
            found.update(path.name.encode() + b"\0" + content)
    return found.hexdigest()


def identity_of(device: torch.device) -> Identity:
    """Returns the identity of a GPU of this machine with the installed Triton and kernels."""
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return Identity(name, 10 * major + minor, importlib.metadata.version("triton"), kernels_hash())


def tuned_blocks(device: torch.device, dtype: torch.dtype) -> Mapping[str, Blocks]:
    """Returns the tuned blocks for a GPU and dtype; empty unless GRAFT_TUNED_BLOCKS selects a file.

    Raises:
        TunedBlocksError: The selected file cannot be used.
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
    """Returns why the selected file cannot be used on a GPU, as a clause; None when it can."""
    try:
        tuned_blocks(device, torch.bfloat16)
    except TunedBlocksError as error:
        return str(error)
    return None


def read(path: Path, identity: Identity) -> Tuned:
    """Reads a file of tuned blocks.

    Args:
        path: The file.
        identity: GPU and software that it must have been measured on.

    Raises:
        TunedBlocksError: The file is missing, damaged, measured on something else, or holds blocks that are
            no candidates for this GPU.
    """
    return _tables(_entries(path, identity), identity.capability)


def _entries(path: Path, identity: Identity) -> dict[str, dict[str, dict[str, Any]]]:
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
        _tables(content["blocks"], identity.capability)
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise _error(path, f"is damaged: {failure!r}") from failure
    found: dict[str, dict[str, dict[str, Any]]] = content["blocks"]
    return found


def _tables(entries: Mapping[str, Mapping[str, Mapping[str, Any]]], capability: int) -> Tuned:
    targets = {name: Target(capability, DTYPES[name]) for name in entries}
    return {
        name: {at: _blocks(at, entry, targets[name]) for at, entry in part.items()}
        for name, part in entries.items()
    }


def _blocks(at: str, entry: Mapping[str, Any], target: Target) -> Blocks:
    """Returns the blocks of one bucket; only candidates, which were compiled ahead of time, are accepted."""
    kind, *sizes = at.split(" ")
    height, columns, depth = map(int, sizes)
    blocks = Blocks(**{field.name: entry[field.name] for field in fields(Blocks)})
    if at != bucket(kind, height, columns, depth) or blocks not in candidates(kind, height, target):
        raise ValueError(f"{at!r} has {blocks}, which are not among the candidates")
    return blocks


def _error(path: Path, why: str) -> TunedBlocksError:
    remedy = f"Measure here with python -m kernels.tune, or unset {VARIABLE}."
    return TunedBlocksError(f"{VARIABLE}: {path} {why}. {remedy}")


def add(path: Path, identity: Identity, found: Tuned, seconds: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds measurements to a file, replacing those of the same buckets; atomic, one process after the other.

    A file that cannot be used here is overwritten.

    Args:
        path: The file.
        identity: GPU and software that were measured.
        found: The blocks.
        seconds: Further fields to record, by the same keys.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            blocks = _entries(path, identity)
        except TunedBlocksError:
            blocks = {}
        for name, part in found.items():
            for at, one in part.items():
                blocks.setdefault(name, {})[at] = {**asdict(one), **seconds.get(name, {}).get(at, {})}
        content = {"format": _FORMAT, **asdict(identity), "blocks": blocks}
        write_text(path, json.dumps(content, indent=1))
