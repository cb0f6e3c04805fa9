"""Run directory: its name, its files, its claim, and the one that a resume goes on with."""

from __future__ import annotations

import re
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError
from recipes.runtime.claim import LOCK, InUseError, claim
from recipes.runtime.relaunch import Launch
from recipes.runtime.run_file import LOAD_FILE, METRICS_FILE, read_run_file

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig

# What a run directory holds before anything was computed.
_OF_EVERY_RUN = {LOCK, "run.json", "config.yaml", METRICS_FILE, LOAD_FILE, "wandb"}
# torchrun gives the processes that it ends half a minute.
_RESTART_PATIENCE_S = 60.0


@dataclass(frozen=True)
class RunDir:
    """Directory ``outputs/<run.name>/`` of a run.

    Attributes:
        path: The directory.
        resumed: Whether an earlier run goes on in it.
        fork: Checkpoint of another run that the first stage starts from; None for none.
        run_id: Name of the run that no other has, also none of the same path; None until it is claimed.
    """

    path: Path
    resumed: bool = False
    fork: Path | None = None
    run_id: str | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def summary(self) -> Path:
        """``summary.json``."""
        return self.path / "summary.json"

    @property
    def export(self) -> Path:
        """The exported model."""
        return self.path / "hf"

    def checkpoints(self, stage: str) -> Path:
        """Returns the folder of a stage's checkpoints; those of the main model are the run's own."""
        return self.path / "checkpoints" if stage == "moe" else self.path / stage / "checkpoints"


def choose_run_dir(config: RunConfig, launch: Launch | None = None) -> RunDir:
    """Decides where a run lives. Call it on rank 0 alone and broadcast: the answer depends on the disk.

    Args:
        config: Config of the run.
        launch: The torchrun command that started this process. A run directory that it has claimed before is
            gone on with whatever ``resume`` says: torchrun has restarted the run.

    Raises:
        ConfigError: The named run exists and is not to be resumed, or what is to be resumed does not.
    """
    outputs = Path(config.output_dir).expanduser().absolute()
    if config.resume not in ("none", "auto"):
        return _from_path(config, outputs, launch)
    if config.run.name is not None:
        path = outputs / config.run.name
        if _used(path) and config.resume == "none" and not (launch and launch.restarts(path)):
            raise ConfigError.one(
                "run.name",
                config.run.name,
                f"{path} holds a run already",
                "Set resume=auto to go on with it, or give another name.",
            )
        return RunDir(path, resumed=_used(path))
    if (claimed := _claimed(config, outputs, launch)) is not None:
        return RunDir(claimed, resumed=True)
    taken = _numbered(outputs, config.job)
    if config.resume == "auto" and taken:
        return RunDir(outputs / f"{config.job}-{max(taken)}", resumed=True)
    return RunDir(outputs / f"{config.job}-{max(taken, default=0) + 1}")


def claim_run_dir(config: RunConfig, launch: Launch | None, held: ExitStack) -> RunDir:
    """Chooses the run directory as `choose_run_dir` does, and claims it until ``held`` is closed.

    Raises:
        ConfigError: As for `choose_run_dir`.
        InUseError: Another process trains in it.
        DiskError: It cannot be written to.
    """
    while True:
        chosen = choose_run_dir(config, launch)
        begins = not chosen.resumed
        restarts = launch is not None and launch.restarts(chosen.path)
        own = ExitStack()
        try:
            patience_s = _RESTART_PATIENCE_S if restarts else 0.0
            named = ("resume", config.resume) if config.run.name is None else ("run.name", config.run.name)
            own.enter_context(claim(chosen.path / LOCK, *named, patience_s=patience_s))
        except InUseError:
            if begins and config.run.name is None:
                continue  # another command has just taken this number
            raise
        with own:
            if begins and _used(chosen.path):
                continue  # another command was faster, and has ended since
            held.enter_context(own.pop_all())
        return chosen


def run_id_of(run_dir: RunDir) -> str:
    """Returns the id of a run: that of its record, else of its newest checkpoint, else a new one.

    Raises:
        CheckpointError: The record is damaged.
    """
    from recipes.checkpoint import own_checkpoints
    from recipes.checkpoint.manifest import parse_manifest

    kept = read_run_file(run_dir.path).get("run_id")
    if kept is None and run_dir.resumed:
        for path in own_checkpoints(run_dir.checkpoints("moe")):
            kept = kept or parse_manifest(path).run
    return kept or uuid.uuid4().hex[:16]


def discard_unused(path: Path) -> None:
    """Deletes the directory of a run that was refused before it did anything; one that holds work stays."""
    inside = {inner.name: inner for inner in path.iterdir()}
    rows = [inside[name] for name in (METRICS_FILE, LOAD_FILE) if name in inside]
    if not inside.keys() <= _OF_EVERY_RUN or any(file.stat().st_size for file in rows):
        return
    shutil.rmtree(path, ignore_errors=True)


def _used(path: Path) -> bool:
    """Tells if a folder holds anything but its lock and files that a killed process was just writing."""
    return path.is_dir() and any(
        not inner.name.startswith(".tmp-") and inner.name != LOCK for inner in path.iterdir()
    )


def _claimed(config: RunConfig, outputs: Path, launch: Launch | None) -> Path | None:
    """Returns the run that earlier processes of this torchrun command have begun."""
    if launch is None:
        return None
    if config.run.name is not None:
        path = outputs / config.run.name
        return path if launch.restarts(path) else None
    return launch.find(outputs / f"{config.job}-{number}" for number in _numbered(outputs, config.job))


def _numbered(outputs: Path, job: str) -> list[int]:
    if not outputs.is_dir():
        return []
    matches = (re.fullmatch(rf"{re.escape(job)}-(\d+)", path.name) for path in outputs.iterdir())
    return [int(match[1]) for match in matches if match]


def _from_path(config: RunConfig, outputs: Path, launch: Launch | None) -> RunDir:
    """Resumes the run ``resume=RUN``, or starts a new one from ``resume=RUN/checkpoints/step-N``."""
    path = Path(config.resume).expanduser().absolute()
    remedy = "Give a run directory, one of its checkpoints, auto or none."
    if not path.is_dir():
        raise ConfigError.one("resume", config.resume, "there is no such directory", remedy)
    if path.name.startswith("step-"):
        if (claimed := _claimed(config, outputs, launch)) is not None:
            return RunDir(claimed, resumed=True, fork=path)
        name = config.run.name or f"{config.job}-{max(_numbered(outputs, config.job), default=0) + 1}"
        target = outputs / name
        if _used(target):
            rule = f"{target} holds a run already, and a checkpoint starts a new one"
            raise ConfigError.one("run.name", name, rule, "Give another name.")
        return RunDir(target, fork=path)
    # A run that was stopped while it calibrated, or in the first of two stages, has no checkpoint there yet;
    # one that trains from scratch alone never has.
    if not any((path / name).is_dir() for name in ("checkpoints", "calibration", "stage1", "scratch")):
        raise ConfigError.one("resume", config.resume, "it holds no checkpoints", remedy)
    return RunDir(path, resumed=True)
