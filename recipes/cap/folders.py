"""Resolves a user's folder: a checkpoint, a run of Graft, or a dense model that belongs to a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError, Mistake
from recipes.checkpoint import find_checkpoint
from recipes.jobs.run_dir import RunDir
from recipes.runtime.run_file import read_run_file
from recipes.runtime.user_json import UserJsonError, read_json_file

_SETTINGS = "config.yaml"
_DENSE, _CONTINUED = "dense", "cpt"


@dataclass(frozen=True)
class Source:
    """Location of a system's files.

    Attributes:
        given: The folder as the user named it.
        folder: Holds ``config.json``, weights and tokenizer.
        trained: A checkpoint of a run whose weights take the place of the folder's; None for none.
    """

    given: Path
    folder: Path
    trained: Path | None = None


def find_source(given: Path) -> Source | Mistake:
    """Resolves a folder.

    A folder with ``config.json`` is taken as it is. ``RUN`` is a run's exported MoE, ``RUN/dense`` the
    dense model it began with, ``RUN/cpt`` that model trained on the same tokens (``compare.cpt=true``).
    """
    if (given / "config.json").exists():
        return Source(given, given)
    if _is_run(given):
        export = RunDir(given).export
        if (export / "config.json").exists():
            return Source(given, export)
        remedy = f"Let the run end, or write one: python -m tools.export {given} --out DIR."
        return Mistake("FOLDER", str(given), "this run has no exported model yet", remedy)
    if given.name in (_DENSE, _CONTINUED) and _is_run(given.parent):
        return _stage(given)
    rule = "there is no config.json in it, and it is not a run"
    return Mistake("FOLDER", str(given), rule, "Give the folder of a local checkpoint, or of a run.")


def _is_run(folder: Path) -> bool:
    return (folder / _SETTINGS).is_file()


def _stage(given: Path) -> Source | Mistake:
    run = given.parent
    try:
        record = read_run_file(run)
        dense = record.get("identity", {}).get("dense")
    except CheckpointError as error:
        return Mistake("FOLDER", str(given), f"{run} cannot be read ({error})", "Restore it.")
    if dense is None or not (Path(dense) / "config.json").exists():
        rule = f"the dense model of {run} is not there ({dense})"
        return Mistake("FOLDER", str(given), rule, "Give the folder of the dense checkpoint itself.")
    if given.name == _DENSE:
        return Source(given, Path(dense))
    trained = find_checkpoint(RunDir(run).checkpoints(_CONTINUED), run=record.get("run_id")).path
    if trained is None:
        rule = f"{run} has no complete checkpoint of it"
        return Mistake("FOLDER", str(given), rule, "Train it: compare.cpt=true.")
    return Source(given, Path(dense), trained)


def read_config(source: Source) -> Mapping[str, Any] | Mistake:
    """Returns the content of ``config.json``."""
    try:
        config = read_json_file(source.folder / "config.json")
    except UserJsonError as error:
        return Mistake("FOLDER", str(source.given), f"its config.json {error.clause}", "Fetch it again.")
    if not isinstance(config, dict):
        return Mistake("FOLDER", str(source.given), "its config.json holds no mapping", "Fetch it again.")
    return config
