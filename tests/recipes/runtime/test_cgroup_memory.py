"""Limits on memory at every height of a process's control groups, in files as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.runtime.cgroup_memory import memory_kills, memory_limits

_V1 = "36 31 0:32 {root} {mount} rw,nosuid - cgroup cgroup rw,memory\n"
_V2 = "30 23 0:27 {root} {mount} rw - cgroup2 cgroup2 rw,nsdelegate\n"
_OTHER = "33 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """The process's folder in /proc."""
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


def lay_out(proc: Path, line: str, root: str, path: str, groups: dict[str, dict[str, str]]) -> None:
    """Mounts groups, whose files are given by their place below the mount."""
    mount = proc.parent / "mount"
    (proc / "mountinfo").write_text(_OTHER + line.format(root=root, mount=mount))
    first = "0::" if line is _V2 else "3:cpu:/x\n4:memory:"
    (proc / "cgroup").write_text(f"{first}{path}\n1:name=systemd:/\n")
    for place, files in groups.items():
        (mount / place).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (mount / place / name).write_text(text)


def test_the_slice_around_a_group_limits_it_in_version_2(proc: Path) -> None:
    leaf = {"memory.max": "max\n", "memory.high": "900\n", "memory.current": "300\n"}
    leaf |= {"memory.stat": "anon 5\ninactive_file 100\n", "memory.events": "oom 4\noom_kill 2\n"}
    around = {"memory.max": "500\n", "memory.high": "max\n", "memory.current": "450\n"}
    groups = {"user.slice/run.scope": leaf, "user.slice": around, "": {"memory.stat": ""}}
    lay_out(proc, _V2, "/", "/user.slice/run.scope", groups)
    assert memory_limits(proc) == [(900, 200), (500, 450)]
    assert memory_kills(proc) == 2


def test_version_1_in_a_container_and_outside(proc: Path) -> None:
    own = {"memory.limit_in_bytes": "700\n", "memory.usage_in_bytes": "600\n"}
    own |= {"memory.stat": "inactive_file 1\ntotal_inactive_file 250\n"}
    own |= {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}
    lay_out(proc, _V1, "/docker/abc", "/docker/abc", {"": own})
    assert memory_limits(proc) == [(700, 350)] and memory_kills(proc) == 3
    parent = {"memory.limit_in_bytes": "400\n", "memory.usage_in_bytes": "10\n"}
    lay_out(proc, _V1, "/", "/slurm/job_1", {"slurm/job_1": own, "slurm": parent, "": {}})
    assert memory_limits(proc) == [(700, 350), (400, 10), (700, 350)]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/gone", ""])
def test_names_from_outside_the_mount_are_not_followed(proc: Path, path: str) -> None:
    outer = {"memory.max": "7\n", "memory.current": "0\n"}
    lay_out(
        proc, _V2, "/", path, {"": {"memory.max": "60\n", "memory.current": "20\n"}, "../elsewhere": outer}
    )
    assert memory_limits(proc) == [(60, 20)]


def test_without_control_groups_there_is_no_limit(proc: Path) -> None:
    assert memory_limits(proc) == [] and memory_kills(proc) == 0
    (proc / "mountinfo").write_text("nonsense\n - \n36 - cgroup2\n")
    (proc / "cgroup").write_bytes(b"\xff\n:\n0::\n")
    assert memory_limits(proc) == [] and memory_kills(proc) == 0
