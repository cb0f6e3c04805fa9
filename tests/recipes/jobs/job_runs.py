"""Runs the whole job on tiny settings, stops it where a test says, and reads what it leaves.

Also a script, for tests that need processes of their own: ``python job_runs.py OPTION=VALUE ...`` is
``train.py`` with the interference that the environment describes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.forked_commands import Ended, run_forked
from tests.forked_python import STARTED_BY, interpreter
from tests.paths import ROOT
from tests.patience import patience
from tests.recipes.jobs.composed_once import composed_once

_STOP_AT = "GRAFT_TEST_STOP_AT"
_PATIENCE_S = 60.0
# What differs from one run to the next whatever it computes.
TIMES = ("time", "tokens_per_s", "step_s", "mfu", "s_mfu", "s_mbu", "goodput")
TIMES += ("memory_bytes", "energy_j", "joules_per_token", "save_stall_s", "save_s", "save_step")
TIMES += ("recovery_s", "s_mbu_busiest_rank")

TINY: dict[str, Any] = {
    "tracker.mode": "disabled",
    "engine.threads": 1,
    "engine.device": "cpu",
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.steps": 4,
    "model.warmup_steps": 1,
    "data.seq_len": 16,
    "data.validation_fraction": 0.2,
    "upcycle.num_experts": 4,
    "optim.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.global_batch_size": 4,
    "train.eval_every": 3,
    "train.eval_samples": 8,
    "train.save_every": 2,
    "train.log_every": 1,
    # Tried by tests of its own.
    "export.try_first": False,
}


@dataclass(frozen=True)
class StopAt:
    """A signal that comes when the row of a step is written: the step after it is the last.

    Attributes:
        stage: Name of the leg.
        step: The step.
        signal: Name of the signal.
        target: ``self``, or ``parent``, which under torchrun is torchrun; or one rank, such as ``rank1``.
    """

    stage: str
    step: int
    signal: str = "SIGINT"
    target: str = "self"

    def text(self) -> str:
        """As `read` takes it."""
        return f"{self.stage} {self.step} {self.signal} {self.target}"

    @staticmethod
    def read(text: str) -> StopAt:
        """From the environment."""
        stage, step, name, target = text.split()
        return StopAt(stage, int(step), name, target)


@contextlib.contextmanager
def interfering(stop_at: StopAt | None) -> Iterator[None]:
    """While open, jobs get the signal where `stop_at` says."""
    if stop_at is None:
        yield
        return
    from recipes.runtime.interrupt import StopRequest
    from recipes.training.callbacks.recorder import Recorder

    requests: list[StopRequest] = []

    class Noted(StopRequest):
        def __init__(self, *, verbose: bool = False) -> None:
            super().__init__(verbose=verbose)
            requests.append(self)

    class Stopping(Recorder):
        def on_row(self, stage: Any, row: Mapping[str, float], load: Any) -> None:
            super().on_row(stage, row, load)
            if (stage.name, row["step"]) == (stop_at.stage, stop_at.step):
                _send(stop_at, requests[-1])

    with patch("recipes.jobs.session.Recorder", Stopping), patch("recipes.jobs.session.StopRequest", Noted):
        yield


def _send(stop_at: StopAt, request: Any) -> None:
    is_rank0 = os.environ.get("RANK", "0") == "0"
    if stop_at.target.startswith("rank"):
        if stop_at.target == f"rank{os.environ['RANK']}":
            os.kill(os.getpid(), getattr(signal, stop_at.signal))
        return
    if stop_at.target == "self" or is_rank0:
        parent = int(os.environ.get(STARTED_BY) or os.getppid())
        os.kill(os.getpid() if stop_at.target == "self" else parent, getattr(signal, stop_at.signal))
    # Every rank waits until its signal has come, so that all runs end at the same step.
    deadline = time.monotonic() + patience(_PATIENCE_S)
    while not request.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert request.requested, f"{stop_at.signal} has not come in {_PATIENCE_S} s"


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Leaves out what the tests of resuming do not look at: figures, and the speed of the machine."""
    from moe.accounting.device_peaks import Peak
    from recipes.tracking.ceilings import Ceiling

    peak = Peak(1e10, "user", "cpu", "float32", "a test", 1e10)
    with (
        patch("recipes.tracking.report.build_report", lambda run_dir: Path(run_dir) / "report.html"),
        patch("recipes.jobs.accounts.peak_for", lambda device, dtype: peak),
        patch("recipes.jobs.accounts.bandwidth_for", lambda device: Ceiling(1e10, "user", "a test")),
    ):
        yield


def arguments(folder: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of a tiny run below ``folder``; a change to None leaves the option out."""
    places = {"output_dir": folder / "outputs", "cache_dir": folder / "cache"}
    options = TINY | places | dict(changes or {})
    recipe = options.pop("+recipe", "upcycle")
    return [f"+recipe={recipe}", *(f"{key}={value}" for key, value in options.items() if value is not None)]


def job(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    stop_at: StopAt | None = None,
    *,
    full: bool = False,
) -> Ended:
    """Runs it in this process, alone; ``full`` with figures and measured peak."""
    from recipes.launch import main

    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(composed_once())
            stack.enter_context(contextlib.nullcontext() if full else quick())
            stack.enter_context(interfering(stop_at))
            code = main(arguments(folder, changes))
    finally:
        torch.set_num_threads(threads)
    return Ended(code, out.getvalue(), err.getvalue())


def process(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    stop_at: StopAt | None = None,
    ranks: int = 0,
    *,
    command: bool = False,
    cold: bool = False,
) -> Ended:
    """Runs it in a process of its own, or with ``ranks`` under torchrun's agent.

    Processes are forked from the server of the session. With ``command``, torchrun starts as it does for a
    user, and its ranks alone are forked; with ``cold``, they start as a user's, and import everything.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if stop_at is not None:
        environment[_STOP_AT] = stop_at.text()
    given = arguments(folder, changes)
    if command or cold:
        torchrun = Path(sys.executable).with_name("torchrun")
        if not cold:
            environment["PYTHON_EXEC"] = interpreter(folder)
        line = [str(torchrun), "--standalone", f"--nproc-per-node={ranks}", __file__, *given]
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=patience(240), cwd=folder
        )
        return Ended(done.returncode, done.stdout, done.stderr)
    if ranks:
        return run_forked(_agent, ranks, given, environment=environment, cwd=folder)
    return run_forked(_script, given, environment=environment, cwd=folder)


def _agent(ranks: int, given: list[str]) -> None:
    """Does what the command torchrun does, with ranks that are forked from it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def forked(config: LaunchConfig, entrypoint: object) -> Callable[..., Any]:
        config.start_method = "fork"
        return lambda *_: elastic_launch(config, _rank)(given)

    with patch.object(run, "elastic_launch", forked):
        record(run.main)(["--standalone", f"--nproc-per-node={ranks}", __file__])


def _rank(given: list[str]) -> None:
    # The agent's own handlers are none of a rank's.
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _script(given)


def write_text(folder: Path, seed: int = 0, suffix: str = "txt") -> str:
    """Ten documents of invented words below ``folder``; returns the pattern that names them."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(draw.choices(words, k=400)) for _ in range(10)]
    if suffix == "jsonl":
        lines = [json.dumps({"body": text}) for text in texts]
        (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(folder / "text.jsonl")
    for number, text in enumerate(texts):
        (folder / f"{number}.{suffix}").write_text(text, encoding="utf-8")
    return str(folder / f"*.{suffix}")


def rows(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """What was computed, step by step, without the times."""
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if row["stage"] == stage
    ]


def loads(run_dir: Path) -> list[dict[str, Any]]:
    """``load.jsonl``."""
    return [json.loads(line) for line in (run_dir / "load.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported model."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))


def digests(folder: Path) -> dict[str, str]:
    """What every file below a folder holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def same_training(run_dir: Path, reference: Path, stages: tuple[str, ...] = ("moe", "cpt")) -> None:
    """Asserts that a run has computed what another has, to the last bit."""
    for stage in stages:
        assert rows(run_dir, stage) == rows(reference, stage), stage
    if "moe" in stages:
        assert loads(run_dir) == loads(reference)
    ours, theirs = weights(run_dir / "hf"), weights(reference / "hf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def summary(run_dir: Path) -> dict[str, Any]:
    """``summary.json``."""
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


def _script(given: list[str]) -> None:
    """Runs ``train.py`` with the interference that the environment describes."""
    from recipes.launch import end_process, main

    stop_at = os.environ.get(_STOP_AT)
    with quick(), composed_once(), interfering(StopAt.read(stop_at) if stop_at else None):
        code = main(given)
    if code or __name__ == "__main__":
        end_process(code)


if __name__ == "__main__":
    _script(sys.argv[1:])
