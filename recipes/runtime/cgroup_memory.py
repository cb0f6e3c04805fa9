"""Limits on memory of the control groups of this process: its own, and those around it, in both versions.

A container, a systemd slice or a Slurm job may set one at any height; the tightest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class _Files:
    """Names of a version's files: limits, bytes in use, the statistic of unused pages, and kills."""

    limits: tuple[str, ...]
    used: str
    inactive: str
    kills: str


_FILES = {
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events"),
    "cgroup": _Files(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
    ),
}


def memory_limits(proc: Path = _PROC) -> list[tuple[int, int]]:
    """Returns limit and use, in bytes, of each group around this process that has a limit.

    Pages of files that nobody uses do not count as used: they are given up when memory is asked for.

    Args:
        proc: Folder of the process in ``/proc``.
    """
    found = []
    for folder, files in _groups(proc):
        limits = [number for name in files.limits if (number := _number(folder / name)) is not None]
        if limits:
            inactive = _entries(folder / "memory.stat").get(files.inactive, 0)
            found.append((min(limits), max(0, (_number(folder / files.used) or 0) - inactive)))
    return found


def memory_kills(proc: Path = _PROC) -> int:
    """Returns how many processes of this process's own group the system has killed for their memory."""
    kinds: dict[str, int] = {}
    for folder, files in _groups(proc):
        kinds.setdefault(files.kills, _entries(folder / files.kills).get("oom_kill", 0))
    return max(kinds.values(), default=0)


def _groups(proc: Path) -> Iterator[tuple[Path, _Files]]:
    """Yields the groups of this process in each version, the innermost first."""
    for kind, (root, mount) in _mounts(proc).items():
        path = _path_of(proc, kind)
        if path is None:
            continue
        # In a container the mount begins at its own group, or the names do.
        inner = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        for part in (inner, *inner.parents):
            if ".." not in part.parts:
                yield mount / part, _FILES[kind]


def _mounts(proc: Path) -> dict[str, tuple[PurePosixPath, Path]]:
    """Returns where the groups that govern memory are mounted, and from which of them on."""
    found = {}
    for line in _lines(proc / "mountinfo"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(), right.split()
        if len(fields) < 5 or len(rest) < 3 or rest[0] not in _FILES:
            continue
        if rest[0] == "cgroup2" or "memory" in rest[2].split(","):
            found[rest[0]] = (PurePosixPath(fields[3]), Path(fields[4]))
    return found


def _path_of(proc: Path, kind: str) -> PurePosixPath | None:
    for line in _lines(proc / "cgroup"):
        number, names, path = (line.split(":", 2) + ["", ""])[:3]
        if (number == "0" and not names) if kind == "cgroup2" else "memory" in names.split(","):
            return PurePosixPath(path or "/")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Reads a number; None for ``max``, and where there is none."""
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isdigit() else None


def _entries(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
