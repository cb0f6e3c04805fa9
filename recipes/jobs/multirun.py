"""Runs a job for each combination of swept options: ``train.py -m router=topk,sigmoid seed=range(0,3)``."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moe.errors import ConfigError, Mistake, UserError
from recipes.config.compose import compose_config, quoted
from recipes.config.search_path import CONF
from recipes.jobs.checked_run import check_command
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.interrupt import INTERRUPTED
from recipes.runtime.source_root import TRAIN, child_environment, interpreter
from recipes.runtime.user_json import UserJsonError, read_json_object

SUMMARY = "multirun.json"
_DIR = "hydra.sweep.dir"
_LONGEST_NAME = 60


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        folder: Its run directory.
        swept: Values of the swept options, as overrides.
        overrides: All overrides.
    """

    folder: Path
    swept: tuple[str, ...]
    overrides: tuple[str, ...]

    def results(self) -> list[dict[str, Any]]:
        """Reads the results of the run.

        Raises:
            UserJsonError: Its summary is damaged or not there.
        """
        found: list[dict[str, Any]] = read_json_object(self.folder / "summary.json").get("results", [])
        return found


def run_sweep(overrides: Sequence[str], ranks: int | None = None, restarts: int = 0) -> int:
    """Checks every run, runs them one after the other, and prints and writes a summary.

    A run that fails does not take the others down. After Ctrl-C or SIGTERM the current one saves and ends,
    and no other starts.

    Args:
        overrides: Those of the command line.
        ranks: Ranks of each run.
        restarts: How often those are started again after a failure.

    Returns:
        The exit code: 0 when all runs are done, 1 when one has failed, 130 when it was stopped.

    Raises:
        ConfigError: A run has mistakes; those of all at once.
    """
    runs = plan_runs(overrides)
    _check_all(runs, ranks)
    flags = [f"--nproc={ranks}", f"--max-restarts={restarts}"] if (ranks or 1) > 1 else []
    codes: list[int] = []
    with _PassOn() as passing:
        for number, run in enumerate(runs):
            title = " ".join(run.swept) or "the only one"
            print(f"[{number + 1}/{len(runs)}] {title} -> {run.folder}", flush=True)
            codes.append(passing.wait([interpreter(), *TRAIN, *flags, *run.overrides]))
            if passing.stopped:
                break
    _summarize(runs, codes)
    return INTERRUPTED if passing.stopped else int(any(codes))


def plan_runs(overrides: Sequence[str]) -> list[SweptRun]:
    """Expands what is swept, in the order of the command line, the last option first.

    Raises:
        ConfigError: A sweep cannot be listed, or its folder is not one.
    """
    parsed = _parse([override for override in overrides if not override.startswith(f"{_DIR}=")])
    given = next((o.partition("=")[2] for o in overrides if o.startswith(f"{_DIR}=")), None)
    choices = [[(text, False)] if values is None else [(v, True) for v in values] for text, values in parsed]
    combinations = list(itertools.product(*choices))
    folder = _folder(given, parsed, [text for text, _ in combinations[0]])
    runs = []
    for number, texts in enumerate(combinations):
        swept = tuple(text for text, is_swept in texts if is_swept)
        place = folder / _name(number, swept)
        where = (f"output_dir={quoted(str(folder))}", f"run.name={quoted(place.name)}")
        runs.append(SweptRun(place, swept, (*(text for text, _ in texts), *where)))
    return runs


def _folder(given: str | None, parsed: Sequence[tuple[str, Any]], first: Sequence[str]) -> Path:
    """Returns the folder of all runs: below ``output_dir``, under ``run.name`` or a time.

    Args:
        given: ``hydra.sweep.dir``, which wins.
        parsed: The overrides and what they are expanded to.
        first: Overrides of the first run.
    """
    for text, values in parsed:
        path, _, value = text.partition("=")
        if path in ("output_dir", "run.name") and (values is not None or "${" in value):
            rule = "a sweep has one folder, with a run directory of its own for each run"
            raise ConfigError.one(path, value, rule, "Give one name, or leave it out.")
    try:
        values = compose_config(first)
    except UserError:
        values = {"output_dir": "outputs"}  # the check of the runs says what is wrong
    name = values.get("run", {}).get("name")
    if values.get("resume") == "auto" and name is None and given is None:
        rule = "a sweep is gone on with by its name"
        raise ConfigError.one("resume", "auto", rule, "Set run.name as well.")
    below = name or time.strftime("multirun/%Y-%m-%d_%H-%M-%S")
    return Path(given or Path(str(values["output_dir"]), str(below))).expanduser().absolute()


def _parse(overrides: Sequence[str]) -> list[tuple[str, list[str] | None]]:
    """Returns each override with what it is expanded to; None for those that sweep nothing."""
    found: list[tuple[str, list[str] | None]] = []
    mistakes = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:
            try:
                (override,) = parser.parse_overrides([text])
                if not override.is_sweep_override():
                    found.append((text, None))
                elif override.is_discrete_sweep():
                    key = override.get_key_element()
                    found.append((text, [f"{key}={value}" for value in override.sweep_string_iterator()]))
                else:
                    path, _, value = text.partition("=")
                    rule = "it has no end of values"
                    mistakes.append(Mistake(path, value, rule, "List them, or write range(from,to,step)."))
            except HydraException:
                found.append((text, None))  # the check of the runs says what is wrong with it
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _name(number: int, swept: Sequence[str]) -> str:
    values = (re.sub(r"[^\w.+-]+", "-", text.partition("=")[2]).strip("-.") for text in swept)
    return "-".join([str(number), *filter(None, values)])[:_LONGEST_NAME]


def _check_all(runs: Sequence[SweptRun], ranks: int | None) -> None:
    mistakes: dict[str, Mistake] = {}
    for run in runs:
        try:
            check_command(run.overrides, ranks or 1)
        except UserError as error:
            mistakes |= {str(mistake): mistake for mistake in error.mistakes}
    if mistakes:
        raise ConfigError(list(mistakes.values()))


class _PassOn:
    """Waits for processes, and passes on the signals that ask to stop.

    A process has a session of its own: Ctrl-C in a terminal reaches it once, from here.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _PassOn:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, command: Sequence[str]) -> int:
        """Runs a command; returns its exit code."""
        self._process = subprocess.Popen(command, env=child_environment(), start_new_session=True)
        if self.stopped:  # while it was being started
            self._process.terminate()
        return self._process.wait()

    def _pass_on(self, number: int, frame: Any) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)


def _summarize(runs: Sequence[SweptRun], codes: Sequence[int]) -> None:
    """Prints a line for each run that was started, and writes all of it beside their directories."""
    rows = []
    for run, code in itertools.zip_longest(runs, codes):
        results, fault = [], ""
        if code is not None:
            try:
                results = run.results()
            except UserJsonError as error:
                # A run that failed says itself why it came to no summary.
                fault = f", but its summary.json {error.clause}" if code == 0 else ""
        rows.append({"run": str(run.folder), "swept": run.swept, "code": code, "results": results})
        losses = [
            f"{row['model']} {row['val_loss']:.4f}" for row in results if row.get("val_loss") is not None
        ]
        state = "not started" if code is None else "done" if code == 0 else f"FAILED with exit code {code}"
        print(f"{run.folder.name}: {state}{': ' if losses else ''}{', '.join(losses)}{fault}", flush=True)
    folder = runs[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / SUMMARY, {"runs": rows})
    print(f"summary: {folder / SUMMARY}")
