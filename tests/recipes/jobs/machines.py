"""Machines of a cluster on one: network, host name and processes of their own, files shared.

Run as a script it makes them and runs a command that finds them in its environment. It needs user and network
namespaces, which a container may forbid: `unsupported_reason` says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.forked_python import interpreter
from tests.paths import ROOT

_NAMES = ("node-a", "node-b")
_INSIDE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
#: Process ids that hold the namespaces of each machine, for whoever runs inside.
HOLDERS = "GRAFT_TEST_MACHINES"


def unsupported_reason() -> str | None:
    """Why no machines can be made here; None where they can."""
    try:
        made = subprocess.run([*_INSIDE, "ip", "link", "show"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return made.stderr.strip() if made.returncode else None


def with_machines(
    command: Sequence[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command that finds the machines by `HOLDERS`; nothing that it starts outlives it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [*_INSIDE, sys.executable, "-m", __name__, *command],
            env=os.environ | environment | {"PYTHON_EXEC": interpreter(Path(folder))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        ) as made,
    ):
        try:
            out, err = made.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(made.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(made.args, made.returncode, out, err)


def _make(folder: Path) -> list[subprocess.Popen[bytes]]:
    addresses = [f"10.77.0.{number + 1}" for number in range(len(_NAMES))]
    known = zip(["127.0.0.1", *addresses], ["localhost", *_NAMES], strict=True)
    (folder / "models").write_text("".join(f"{address} {name}\n" for address, name in known))
    _run("mount", "--bind", str(folder / "models"), "/etc/hosts")
    holders = [subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"]) for _ in _NAMES]
    for holder in holders:
        # Until then it is still in our namespaces.
        while os.readlink(f"/proc/{holder.pid}/ns/uts") == os.readlink("/proc/self/ns/uts"):
            os.sched_yield()
    _run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    for number, (holder, address) in enumerate(zip(holders, addresses, strict=True)):
        wire, inside = f"wire{number}", ("nsenter", f"--target={holder.pid}", "--net", "--uts")
        _run("ip", "link", "set", wire, "netns", str(holder.pid))
        _run(*inside, "hostname", _NAMES[number])
        _run(*inside, "ip", "address", "add", f"{address}/24", "dev", wire)
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", wire, "up")
    return holders


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    """Makes the machines, runs the command, and takes them down."""
    with tempfile.TemporaryDirectory() as folder:
        holders = _make(Path(folder))
        here = os.environ | {HOLDERS: " ".join(str(holder.pid) for holder in holders)}
        try:
            return subprocess.run(sys.argv[1:], env=here).returncode
        finally:
            for holder in holders:
                holder.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
