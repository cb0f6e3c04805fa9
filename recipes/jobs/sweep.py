"""Runs of a sweep: which of them are done, and the others, several at a time.

A failed run takes no other down, and an interrupted one goes on from its newest checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from moe.errors import ConfigError, DataError, Mistake, UserError
from recipes.jobs.changed_options import read_options
from recipes.jobs.checked_run import Further, check_command, no_more
from recipes.runtime.interrupt import INTERRUPTED
from recipes.runtime.run_file import METRICS_FILE
from recipes.runtime.source_root import TRAIN, child_environment, interpreter
from recipes.runtime.user_json import UserJsonError, read_json_object

_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        folder: Its run directory.
        overrides: Its command line.
        swept: Those of them that distinguish it from the others.
        models: Models in the summary of the finished run; empty while unknown.
        values: Its composed options; None while unknown.
    """

    folder: Path
    overrides: tuple[str, ...]
    swept: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    values: Mapping[str, Any] | None = None

    @property
    def done(self) -> bool:
        """True when every model is trained, under these options, and the export has not failed."""
        summary = self.summary()
        found = {row["model"] for row in summary.get("results", [])}
        whole = bool(self.models) and found.issuperset(self.models)
        return whole and "failed" not in summary.get("export", {}) and self._has_these_options()

    def _has_these_options(self) -> bool:
        if self.values is None:
            return True
        began = read_options(self.folder)
        return bool(began) and {**began, "resume": None} == {**self.values, "resume": None}

    @property
    def prepared(self) -> bool:
        """True once it trains: tokenizer and tokens are in the cache then."""
        return (self.folder / METRICS_FILE).is_file()

    @property
    def log(self) -> Path:
        """File of everything that the run printed, where runs print to files."""
        return self.folder.with_suffix(".log")

    def summary(self) -> dict[str, Any]:
        """Reads ``summary.json``; empty where there is none yet.

        Raises:
            DataError: It is damaged.
        """
        path = self.folder / "summary.json"
        try:
            return read_json_object(path) if path.exists() else {}
        except UserJsonError as error:
            remedy = "Delete it: the run is then made again."
            raise DataError.one("summary", str(path), f"it {error}", remedy) from None


RunT = TypeVar("RunT", bound=SweptRun)
T = TypeVar("T")
CheckedT = TypeVar("CheckedT")
#: Starts a run.
Launch = Callable[[Any], "subprocess.Popen[bytes]"]


def checked(runs: Sequence[RunT], ranks: int, further: Further = no_more) -> list[RunT]:
    """Checks every run; returns them with their options and the models that they make.

    Args:
        runs: The runs.
        ranks: Ranks of each.
        further: As for `check_command`.

    Raises:
        ConfigError: Some have mistakes; those of all at once.
    """
    known = _each(runs, lambda run: check_command(run.overrides, ranks, further))
    _each(known, lambda one: one.check_models())
    return [
        replace(run, models=one.job.models(one.config), values=one.values)
        for run, one in zip(runs, known, strict=True)
    ]


def _each(items: Sequence[T], check: Callable[[T], CheckedT]) -> list[CheckedT]:
    """Returns what a check gives for each item; raises the mistakes of all at once, each only once."""
    mistakes: dict[str, Mistake] = {}
    found = []
    for item in items:
        try:
            found.append(check(item))
        except UserError as error:
            mistakes |= {str(mistake): mistake for mistake in error.mistakes}
    if mistakes:
        raise ConfigError(list(mistakes.values()))
    return found


def launcher(ranks: int, restarts: int = 0, *, to_files: bool = False) -> Launch:
    """Returns a function that starts a run.

    Args:
        ranks: Ranks of each run.
        restarts: How often those are started again after a failure.
        to_files: Whether a run prints to its log instead of the console.
    """
    flags = [f"--nproc={ranks}", f"--max-restarts={restarts}"] if ranks > 1 else []

    def launch(run: SweptRun) -> subprocess.Popen[bytes]:
        command = [interpreter(), *TRAIN, *flags, *run.overrides]
        # A session of its own: Ctrl-C in a terminal reaches it once, from `_PassOn`.
        how: dict[str, Any] = {"env": child_environment(), "start_new_session": True}
        if not to_files:
            return subprocess.Popen(command, **how)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)

    return launch


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep has ended.

    Attributes:
        codes: Exit code of each run; None for those that were not started.
        stopped: Whether it was asked to stop.
    """

    codes: Sequence[int | None]
    stopped: bool

    @property
    def exit_code(self) -> int:
        """0 when all runs are done, 1 when one has failed, 130 when it was stopped."""
        return INTERRUPTED if self.stopped else int(any(self.codes))


def run_all(
    runs: Sequence[SweptRun], launch: Launch, tell: Callable[[str], None], *, parallel: int = 1
) -> SweepEnd:
    """Runs those that are not done; the first runs alone until the cache holds what all share.

    After Ctrl-C or SIGTERM the runs are asked to save, and no other starts.

    Args:
        runs: The runs, in order.
        launch: Starts one.
        tell: Takes a line for each run that is done already, starts or ends.
        parallel: Runs at a time.
    """
    codes: list[int | None] = [0 if run.done else None for run in runs]
    pending = [number for number, code in enumerate(codes) if code is None]
    for number, run in enumerate(runs):
        if number not in pending:
            tell(f"[{number + 1}/{len(runs)}] {run.folder.name}: done already")
    with _PassOn() as passing:
        while passing.running or (pending and not passing.stopped):
            limit = parallel if any(run.prepared for run in runs) else 1
            while pending and len(passing.running) < limit and not passing.stopped:
                number = pending.pop(0)
                run = runs[number]
                tell(f"[{number + 1}/{len(runs)}] {' '.join(run.swept) or 'the only one'} -> {run.folder}")
                passing.start(number, lambda run=run: launch(run))
            for number, code, seconds in passing.ended():
                codes[number] = code
                tell(_outcome(runs[number], code, seconds, len(pending) + len(passing.running)))
            time.sleep(_POLL_S)
    return SweepEnd(codes, passing.stopped)


def _outcome(run: SweptRun, code: int, seconds: float, left: int) -> str:
    log = f", see {run.log}" if code and run.log.is_file() else ""
    return f"{run.folder.name}: {state_of(code)} ({seconds:.0f} s), {left} to go{log}"


def state_of(code: int | None) -> str:
    """Returns an exit code in words."""
    known = {None: "not started", 0: "done", INTERRUPTED: "stopped"}
    return known.get(code, f"FAILED with exit code {code}")


class _PassOn:
    """Processes by number, to which signals that ask to stop are passed on.

    Attributes:
        stopped: True once there was such a signal.
        running: The processes that have not ended.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self._began: dict[int, float] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *unused: object) -> None:
        for process in self.running.values():  # only after an error of our own
            process.terminate()
            process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, number: int, launch: Callable[[], subprocess.Popen[bytes]]) -> None:
        """Starts a process."""
        self._began[number] = time.perf_counter()
        self.running[number] = launch()
        if self.stopped:  # while it was being started
            self.running[number].terminate()

    def ended(self) -> list[tuple[int, int, float]]:
        """Returns number, exit code and seconds of the processes that have ended since."""
        found = []
        for number, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[number]
                found.append((number, code, time.perf_counter() - self._began[number]))
        return found

    def _pass_on(self, number: int, frame: Any) -> None:
        self.stopped = True
        for process in self.running.values():
            process.send_signal(number)
