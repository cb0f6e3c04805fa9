"""Checks, before a run starts, that all ranks have the same config and the same code."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from torch.distributed import Store

from moe.errors import Mistake, UserError
from recipes.runtime.source_root import PACKAGES, SOURCE_ROOT

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton", "deepspeed", "megatron-core")
# Each machine may have its own cache folder.
_MAY_DIFFER = frozenset({"cache_dir"})
_FILES_SHOWN = 5
_SHOWN = 12
_WAIT_S = 60.0
_CONFIG, _CODE, _VERSIONS = "config", "code", "versions"
_REMEDIES = {
    _CONFIG: "Start all ranks with the same command.",
    _CODE: "Put the same version of Graft on all machines.",
    _VERSIONS: "Install the same packages on all machines: make setup.",
}


class DisagreementError(UserError):
    """Ranks of one run were started differently."""


Facts = dict[str, dict[str, Any]]


def facts_of_this_rank(values: Mapping[str, Any]) -> Facts:
    """Collects the facts that must be the same on all ranks, by kind and name.

    Args:
        values: The composed config.
    """
    flat = {path: value for path, value in _flat(values, "") if path not in _MAY_DIFFER}
    return {_CONFIG: flat, _CODE: _own_sources(), _VERSIONS: _versions()}


@functools.cache
def _own_sources() -> dict[str, str]:
    """Returns the hashes of this process' own code, read once however many runs it does."""
    return source_hashes(SOURCE_ROOT)


def source_hashes(root: Path) -> dict[str, str]:
    """Computes the first 16 digits of each source file's sha256, by its path below the root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def require_agreement(
    store: Store, rank: int, world_size: int, facts: Facts, *, patience_s: float = 1800.0
) -> None:
    """Compares all ranks with rank 0. Collective; sends a hash per rank, and facts only where these differ.

    Args:
        store: A store that all ranks share.
        rank: Rank of this process.
        world_size: Number of ranks.
        facts: Facts of this rank.
        patience_s: How long rank 0 waits for the others.

    Raises:
        DisagreementError: Ranks differ or are missing; raised on all ranks, and names them.
    """
    if world_size == 1:
        return
    text = json.dumps(facts, sort_keys=True, default=str)
    store.set(f"hash/{rank}", hashlib.sha256(text.encode()).hexdigest())
    wait = timedelta(seconds=patience_s + _WAIT_S)
    if rank == 0:
        mistakes = _missing(store, world_size, patience_s)
        groups = {} if mistakes else _groups(store, world_size)
        asked = [ranks[0] for ranks in groups.values()]
        store.set("asked", json.dumps(asked))
        for ranks in list(groups.values())[1:]:
            store.wait([f"facts/{ranks[0]}"], wait)
            mistakes += compare(json.loads(text), json.loads(store.get(f"facts/{ranks[0]}")), ranks)
        store.set("found", json.dumps([(m.path, m.value, m.rule, m.remedy) for m in mistakes[:_SHOWN]]))
    store.wait(["asked"], wait)
    if rank and rank in json.loads(store.get("asked")):
        store.set(f"facts/{rank}", text)
    store.wait(["found"], wait)
    found = [Mistake(*mistake) for mistake in json.loads(store.get("found"))]
    # Rank 0 may hold the store, so it leaves last.
    store.set(f"read/{rank}", "")
    if rank == 0:
        came = [other for other in range(world_size) if store.check([f"hash/{other}"])]
        _wait_for([f"read/{other}" for other in came], store, _WAIT_S)
    if found:
        raise DisagreementError(found)


def compare(first: Facts, other: Facts, ranks: Sequence[int]) -> list[Mistake]:
    """Lists how the facts of ranks that agree with one another differ from those of rank 0."""
    who = f"rank{'s' * (len(ranks) > 1)} {_list([str(rank) for rank in ranks])}"
    mistakes = []
    for kind in (_CONFIG, _VERSIONS):
        for name in sorted(set(first[kind]) | set(other[kind])):
            ours, theirs = first[kind].get(name), other[kind].get(name)
            if ours != theirs:
                rule = f"this is what {who} {_has(ranks)}, and rank 0 has {ours!r}"
                mistakes.append(Mistake(name, theirs, rule, _REMEDIES[kind]))
    names = sorted(set(first[_CODE]) | set(other[_CODE]))
    files = [name for name in names if first[_CODE].get(name) != other[_CODE].get(name)]
    if files:
        rule = f"the source of {who} differs from that of rank 0 in {len(files)} files"
        mistakes.append(Mistake("code", _list(files), rule, _REMEDIES[_CODE]))
    return mistakes


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_FILES_SHOWN]) + (" ..." if len(names) > _FILES_SHOWN else "")


def _groups(store: Store, world_size: int) -> dict[str, list[int]]:
    """Groups ranks by their hash, that of rank 0 first."""
    groups: dict[str, list[int]] = {}
    for rank in range(world_size):
        groups.setdefault(store.get(f"hash/{rank}").decode(), []).append(rank)
    return groups


def _missing(store: Store, world_size: int, patience_s: float) -> list[Mistake]:
    keys = [f"hash/{rank}" for rank in range(world_size)]
    if _wait_for(keys, store, patience_s):
        return []
    gone = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    rule = f"they have not come within {patience_s:g} s of rank 0"
    return [Mistake("ranks", _list(gone), rule, "Look at what their machines print.")]


def _wait_for(keys: list[str], store: Store, seconds: float) -> bool:
    """Waits for keys; returns False if some are missing after the time."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return True


def _flat(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}".lstrip("."))]
    return [(path, value)]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
