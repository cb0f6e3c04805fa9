"""Runs a job for each combination of swept options: ``train.py -m router=topk,sigmoid seed=range(0,3)``."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moe.errors import ConfigError, DataError, Mistake, UserError
from recipes.config.compose import compose_config, quoted
from recipes.config.search_path import CONF
from recipes.jobs.checked_run import Further, no_more
from recipes.jobs.sweep import SweptRun, checked, launcher, run_all, state_of
from recipes.runtime.atomic import atomic_write_json

SUMMARY = "multirun.json"
_DIR = "hydra.sweep.dir"
_LONGEST_NAME = 60


def run_sweep(
    overrides: Sequence[str], ranks: int | None = None, restarts: int = 0, further: Further = no_more
) -> int:
    """Checks every run, runs them one after the other, and prints and writes a summary.

    A run that fails does not take the others down. After Ctrl-C or SIGTERM the current one saves and ends,
    and no other starts.

    Args:
        overrides: Those of the command line.
        ranks: Ranks of each run.
        restarts: How often those are started again after a failure.
        further: As for `recipes.jobs.checked_run.check_command`.

    Returns:
        The exit code: 0 when all runs are done, 1 when one has failed, 130 when it was stopped.

    Raises:
        ConfigError: A run has mistakes; those of all at once.
    """
    runs = checked(plan_runs(overrides), ranks or 1, further)
    end = run_all(runs, launcher(ranks or 1, restarts), partial(print, flush=True))
    _summarize(runs, end.codes)
    return end.exit_code


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
        overrides_of = (*(text for text, _ in texts), *where)
        runs.append(SweptRun(folder=place, overrides=overrides_of, swept=swept))
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


def _summarize(runs: Sequence[SweptRun], codes: Sequence[int | None]) -> None:
    """Prints a line for each run that was started, and writes all of it beside their directories."""
    rows = []
    for run, code in zip(runs, codes, strict=True):
        results, fault = [], ""
        if code is not None:
            try:
                results = run.summary().get("results", [])
                fault = "" if results or code else ", but it has left no results"
            except DataError as error:
                # A run that failed says itself why it came to no summary.
                said = error.mistakes[0].rule.removeprefix("it ")
                fault = "" if code else f", but its summary.json {said}"
        rows.append({"run": str(run.folder), "swept": run.swept, "code": code, "results": results})
        losses = [
            f"{row['model']} {row['val_loss']:.4f}" for row in results if row.get("val_loss") is not None
        ]
        print(
            f"{run.folder.name}: {state_of(code)}{': ' if losses else ''}{', '.join(losses)}{fault}",
            flush=True,
        )
    folder = runs[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / SUMMARY, {"runs": rows})
    print(f"summary: {folder / SUMMARY}")
