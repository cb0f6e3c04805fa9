"""Sweeps of ``train.py``: finds the trials that are not done and runs them, several at a time.

A failed trial takes no other down, and an interrupted one goes on from its newest checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from moe.errors import DataError
from recipes.runtime.source_root import TRAIN, child_environment, torchrun
from recipes.runtime.user_json import read_json_object
from recipes.tracking.metrics_log import METRICS_FILE

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep.

    Attributes:
        seed: Seed of the weights that are drawn; data, their order and the validation set keep seed 0.
        folder: The run directory.
    """

    recipe: ClassVar[str]
    seed: int
    folder: Path

    @property
    def stages(self) -> tuple[str, ...]:
        """Models in the summary of a finished run."""
        return ("moe",)

    @property
    def own(self) -> list[str]:
        """Overrides that distinguish this trial from the others."""
        return [f"seed={self.seed}"]

    @property
    def done(self) -> bool:
        """True when every stage of the run has finished."""
        return {row["model"] for row in self.summary().get("results", [])}.issuperset(self.stages)

    @property
    def prepared(self) -> bool:
        """True once it trains: tokenizer and tokens are in the cache then."""
        return (self.folder / METRICS_FILE).is_file()

    @property
    def log(self) -> Path:
        """File of everything that the run printed."""
        return self.folder.with_suffix(".log")

    def summary(self) -> dict[str, Any]:
        """Reads ``summary.json``; empty where there is none yet."""
        path = self.folder / "summary.json"
        try:
            return read_json_object(path) if path.exists() else {}
        except ValueError as error:
            remedy = "Delete it: the run is then made again."
            raise DataError.one("summary", str(path), f"it {error}", remedy) from None

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """Returns the command line of ``train.py``; the trial's own overrides come last, so that they win."""
        place = [f"output_dir={self.folder.parent}", f"run.name={self.folder.name}"]
        common = ["data.seed=0", "tracker.mode=disabled", *place, "resume=auto"]
        return [f"+recipe={self.recipe}", *overrides, *self.own, *common]


Launch = Callable[[Any], "subprocess.Popen[bytes]"]


def launcher(overrides: Sequence[str], ranks: int) -> Launch:
    """Returns a function that starts a trial on this many ranks."""

    def launch(trial: Trial) -> subprocess.Popen[bytes]:
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        command = torchrun(ranks) if ranks > 1 else [sys.executable]
        command += [*TRAIN, *trial.arguments(overrides)]
        with trial.log.open("ab") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, env=child_environment(), **output)

    return launch


def run_trials(trials: Sequence[Trial], launch: Launch, parallel: int, log: Callable[[str], None]) -> None:
    """Runs the trials that are not done; the first runs alone until the cache holds what all share.

    Args:
        trials: All trials of the sweep, in order.
        launch: Starts one.
        parallel: Trials at a time.
        log: Takes a line for each trial that ended.

    Raises:
        KeyboardInterrupt: The sweep was interrupted; its runs were asked to save and have ended.
    """
    pending = [trial for trial in trials if not trial.done]
    running: dict[Trial, tuple[subprocess.Popen[bytes], float]] = {}
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while pending or running:
            limit = parallel if any(trial.prepared for trial in trials) else 1
            while pending and len(running) < limit:
                trial = pending.pop(0)
                running[trial] = (launch(trial), time.perf_counter())
            for trial in [trial for trial, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(trial)
                left = len(pending) + len(running)
                log(_outcome(trial, process.returncode, time.perf_counter() - began, left))
            time.sleep(_POLL_S)
    except BaseException:
        _stop([process for process, _ in running.values()])
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # SIGTERM, because a terminal has sent SIGINT to all of us, and a second one ends a run without saving.
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _outcome(trial: Trial, code: int, seconds: float, left: int) -> str:
    outcome = "done" if code == 0 else f"FAILED with exit code {code}, see {trial.log}"
    return f"{trial.folder.name}: {outcome} ({seconds:.0f} s), {left} to go"
