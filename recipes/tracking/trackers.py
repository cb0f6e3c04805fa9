"""Dashboards: every row goes to ``metrics.jsonl`` first and to Weights & Biases second.

The files are the record, which wandb mirrors. Any failure of wandb (no network, a key that is
refused, its process killed) is logged once, and training continues without it. wandb only appends: steps
that a resumed run repeats are twice in its charts, and once in ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import netrc
import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from moe.errors import DiskError, Mistake
from recipes.runtime.extras import install_line, is_there
from recipes.runtime.run_file import LOAD_FILE, METRICS_FILE
from recipes.tracking.buffered_log import BufferedLog
from recipes.tracking.config import MODES, TrackerConfig
from recipes.tracking.report.colours import load_image

_LOG = logging.getLogger("graft.tracking")
_SAME_SERVER = {"api.forge.coreweave.com": ("api.wandb.ai",)}  # wandb takes the second's key for the first
_MAX_BINS = 512  # wandb refuses histograms with more
_NOT_CHARTED = frozenset({"stage", "time"})  # the stage is in every name, and wandb keeps its own time


@dataclass(frozen=True)
class ExpertLoad:
    """Load of every expert in a step, from `moe.metrics.LoadReport`.

    Attributes:
        layers: Index of each MoE layer in the model.
        load: Layer by expert, the share of routed slots; a layer's shares sum to 1.
    """

    layers: Sequence[int]
    load: Sequence[Sequence[float]]


class NullTracker:
    """Tracker that tracks nothing: on other ranks, when disabled, and after wandb has failed.

    Attributes:
        run_id: Id that a checkpoint stores, so that a resumed run continues the same charts; None where no
            tracker has run.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, row: Mapping[str, Any], load: ExpertLoad | None = None) -> None:
        """Takes the row of a step, with ``stage`` and ``step``, and the experts' load where known."""

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Ends the charts, with the figures to keep as the run's summary."""


class Tracker(NullTracker):
    """Tracker that mirrors rows to a wandb run and never raises on account of wandb. Made by `start`."""

    def __init__(self, wandb: ModuleType, run: Any, media_every: int) -> None:
        super().__init__(run.id)
        self._wandb = wandb
        self._run = run
        self._media_every = media_every
        self._stages: set[str] = set()

    def log(self, row: Mapping[str, Any], load: ExpertLoad | None = None) -> None:
        """Sends one row in one call: names behind their stage (``moe/loss``), drawn over ``<stage>/step``."""
        self._attempt(lambda: self._send(row, load))

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Writes the summary and waits, at most the configured time, until wandb has everything."""
        self._attempt(lambda: self._end(summary or {}))
        self._run = None

    def _attempt(self, action: Callable[[], None]) -> None:
        """Runs ``action`` unless wandb has failed before; the first failure is logged and ends the charts."""
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            folder = _shown(self._run)
            self._run = None
            _give_up(self._wandb, error, f"To upload what it had taken: wandb sync {folder}")

    def _send(self, row: Mapping[str, Any], load: ExpertLoad | None) -> None:
        stage = str(row["stage"])
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        values = {f"{stage}/{key}": value for key, value in row.items() if key not in _NOT_CHARTED}
        if load is not None and row["step"] % self._media_every == 0:
            values |= self._media(stage, load)
        self._run.log(values)

    def _end(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()

    def _media(self, stage: str, load: ExpertLoad) -> dict[str, Any]:
        """Makes a picture of all layers, and for each layer a histogram of the load by expert."""
        load_LE = np.asarray(load.load, dtype=np.float64)
        caption = "rows: MoE layers, columns: experts; blue 0, pale 1, red 2 or more times the uniform load"
        media = {f"{stage}/load": self._wandb.Image(load_image(load_LE), caption=caption)}
        for layer, load_E in zip(load.layers, load_LE, strict=True):
            bins = np.histogram(
                np.arange(load_E.size),
                bins=min(load_E.size, _MAX_BINS),
                range=(0, load_E.size),
                weights=load_E,
            )
            media[f"{stage}/layer/{layer:02d}/load"] = self._wandb.Histogram(np_histogram=bins)
        return media


def start(
    cfg: TrackerConfig,
    run_dir: str | Path,
    run_name: str,
    config: Mapping[str, Any],
    run_id: str | None = None,
    rank: int = 0,
    log: Callable[[str], None] = print,
) -> NullTracker:
    """Starts the charts of a run on rank 0 and logs their place in one line.

    Args:
        cfg: Settings of the charts.
        run_dir: The run directory; everything that wandb keeps is written to its ``wandb`` folder.
        run_name: Name of the run.
        config: The resolved configuration, shown beside the charts.
        run_id: Id from the resumed checkpoint, to continue its charts; None starts new ones.
        rank: Global rank of this process.
        log: Takes the line.

    Returns:
        A `Tracker`; a `NullTracker` on other ranks, when disabled, without wandb, and when wandb cannot
        start, which is logged as a warning.
    """
    if rank != 0 or cfg.mode == "disabled":
        return NullTracker(run_id)
    if cfg.mode == "auto" and not is_there("wandb"):
        log(f"wandb: off (not installed; for charts: {install_line('wandb')})")
        return NullTracker(run_id)
    run_id = run_id or secrets.token_hex(4)
    wandb: Any = None
    try:
        with _environment(Path(run_dir)):
            wandb = importlib.import_module("wandb")
            mode, reason = _choose_mode(cfg, wandb)
            if mode == "disabled":
                log(f"wandb: off ({reason})")
                return NullTracker(run_id)
            run = _init(wandb, cfg, mode, Path(run_dir), name=run_name, id=run_id, config=dict(config))
    except Exception as error:
        _give_up(wandb, error)
        return NullTracker(run_id)
    log(_where(run, mode, reason))
    return Tracker(wandb, run, cfg.media_every)


def _init(wandb: Any, cfg: TrackerConfig, mode: str, run_dir: Path, **run: Any) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=cfg.timeout_s,
        finish_timeout=cfg.timeout_s,
        finish_timeout_raises=True,
    )
    folder = str(run_dir.resolve())
    named = {"project": cfg.project, "entity": cfg.entity, "group": cfg.group, "tags": list(cfg.tags)}
    return wandb.init(dir=folder, mode=mode, resume="allow", settings=settings, **named, **run)


def _choose_mode(cfg: TrackerConfig, wandb: Any) -> tuple[str, str]:
    """Returns the mode to run in, and the reason.

    Raises:
        RuntimeError: The environment names an unknown mode, or online is asked for without a key.
    """
    asked = os.environ.get("WANDB_MODE", "") if cfg.mode == "auto" else cfg.mode
    if asked and asked not in MODES:
        raise RuntimeError(f"WANDB_MODE={asked!r} is none of {', '.join(MODES)}")
    reason = "set by WANDB_MODE" if cfg.mode == "auto" else "set by tracker.mode"
    mode = MODES.get(asked, "")
    if mode in ("offline", "disabled"):
        return mode, reason
    source = _credentials(wandb)
    if mode == "online" and source is None:
        raise RuntimeError(
            f"mode online, {reason}, needs an API key; run `wandb login`, or set WANDB_API_KEY"
        )
    return ("online", f"key from {source}") if source else ("offline", "no API key found")


def _credentials(wandb: Any) -> str | None:
    """Returns the place where wandb would find a key, without using it; None if there is none."""
    for name in ("WANDB_IDENTITY_TOKEN_FILE", "WANDB_API_KEY"):
        if os.environ.get(name):
            return name
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if settings.api_key:
        return "the wandb settings"
    host = urlsplit(settings.base_url).netloc
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        known = netrc.netrc(path).hosts if path.is_file() else {}
        if any(name in known for name in (host, *_SAME_SERVER.get(host, ()))):
            return str(path)
    return None


def _where(run: Any, mode: str, reason: str) -> str:
    if mode == "online":
        return f"wandb: online ({reason}): {run.url}"
    return f"wandb: offline ({reason}); to upload the charts: wandb sync {_shown(run)}"


def _shown(run: Any) -> str:
    """Returns the folder of a wandb run, quoted for a shell."""
    folder, here = Path(run.dir).parent, Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))


@contextlib.contextmanager
def _environment(run_dir: Path) -> Iterator[None]:
    """Keeps wandb quiet and its logs in the run directory while it starts; its service inherits both."""
    wanted = {"WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(run_dir.resolve() / "wandb" / "cache")}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _give_up(wandb: Any, error: Exception, kept: str = "It has no charts of this run.") -> None:
    """Logs once that wandb has failed, and tears it down, so that it is quiet at exit too."""
    first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    _LOG.warning(
        "wandb failed and is off (%s). Training goes on; metrics.jsonl has everything. %s", first, kept
    )
    if wandb is not None:
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)


class RunLogger:
    """Logger of a training loop: rows go to the files first, then to the tracker.

    Rank 0 writes ``metrics.jsonl`` and ``load.jsonl``; on the other ranks every method does nothing, so
    that a loop calls it alike everywhere.

    Args:
        run_dir: The run directory.
        tracker: Result of `start`.
        rank: Global rank of this process.

    Raises:
        DiskError: A file cannot be opened.
    """

    def __init__(self, run_dir: str | Path, tracker: NullTracker, rank: int = 0) -> None:
        self.tracker = tracker
        self._logs: tuple[BufferedLog, ...] = ()
        if rank == 0:
            self._logs = (BufferedLog(Path(run_dir) / METRICS_FILE), BufferedLog(Path(run_dir) / LOAD_FILE))

    def log(self, row: Mapping[str, Any], load: ExpertLoad | None = None) -> None:
        """Logs a step.

        Args:
            row: Numbers by name, with at least ``stage`` and ``step``.
            load: Load of every expert, in steps where it is known.

        Raises:
            DiskError: Too many rows cannot be written; a few wait, with one warning.
        """
        if not self._logs:
            return
        metrics, loads = self._logs
        metrics.append(row)
        if load is not None:
            layers = list(load.layers)
            loads.append(
                {"stage": row["stage"], "step": row["step"], "layers": layers, "load": list(load.load)}
            )
        self.tracker.log(row, load)

    def truncate_after(self, stage: str, step: int) -> int:
        """Drops the rows of ``stage`` past ``step`` from the files, before a resumed run writes them again.

        Later stages of the run are dropped with ``step`` -1.

        Returns:
            The number of dropped rows of metrics.
        """
        return [log.truncate_after(stage, step) for log in self._logs][0] if self._logs else 0

    def sync(self) -> None:
        """Waits until the disk has every row; call it before a checkpoint counts as written."""
        for log in self._logs:
            log.sync()

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Closes the files, then the charts. The figures of ``summary`` become the charts' summary.

        Raises:
            DiskError: Rows were not written; everything is closed nevertheless.
        """
        mistakes: list[Mistake] = []
        for log in self._logs:
            try:
                log.close()
            except DiskError as error:
                mistakes += error.mistakes
        self.tracker.finish(summary)
        if mistakes:
            raise DiskError(mistakes)
