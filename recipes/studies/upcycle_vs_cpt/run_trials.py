"""Starts the runs of the grid as processes, several at a time; a failed one takes no other down."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from recipes.runtime.source_root import SOURCE_ROOT
from recipes.studies.upcycle_vs_cpt.arms_trials import Trial

_POLL_S = 0.5
_Launch = Callable[[Trial], "subprocess.Popen[bytes]"]


def run_trials(trials: Sequence[Trial], launch: _Launch, parallel: int, log: Callable[[str], None]) -> None:
    """Runs what is not done. The first run is alone until the cache holds what all share.

    Args:
        trials: All of the grid, in order.
        launch: Starts one.
        parallel: How many at a time.
        log: Takes a line for each run that ended.

    Raises:
        KeyboardInterrupt: The grid was interrupted; its runs have been asked to save, and have ended.
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


def launcher(overrides: Sequence[str], ranks: int) -> _Launch:
    """What starts a run under train.py, on so many ranks; it goes on from its newest checkpoint."""

    def launch(trial: Trial) -> subprocess.Popen[bytes]:
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(SOURCE_ROOT / "train.py"), *trial.arguments(overrides)]
        with trial.log.open("ab") as log:
            return subprocess.Popen(command, cwd=SOURCE_ROOT, stdout=log, stderr=subprocess.STDOUT)

    return launch


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # Not SIGINT: a terminal has sent that to all of us, and a second one ends a run without saving.
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _outcome(trial: Trial, code: int, seconds: float, left: int) -> str:
    outcome = "done" if code == 0 else f"FAILED with exit code {code}, see {trial.log}"
    return f"{trial.folder.name}: {outcome} ({seconds:.0f} s), {left} to go"
