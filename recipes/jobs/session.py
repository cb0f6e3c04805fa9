"""Opens engine, run directory and tracker, runs a job, and closes everything whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from moe.errors import DiskError, GraftError, UserError
from recipes.config.compose import to_yaml
from recipes.config.schema import RunConfig
from recipes.engines import engine_classes
from recipes.engines.base import Engine
from recipes.jobs.base import Job, Session
from recipes.jobs.run_dir import RunDir, claim_run_dir, discard_unused, run_id_of
from recipes.runtime.agreement import facts_of_this_rank, require_agreement
from recipes.runtime.atomic import atomic_write_text, write_synced
from recipes.runtime.clock import steady_time
from recipes.runtime.heartbeat import Heartbeat
from recipes.runtime.interrupt import StopRequest
from recipes.runtime.ranks import Ranks
from recipes.runtime.relaunch import Launch
from recipes.runtime.rendezvous import group_store, launch_store
from recipes.runtime.run_file import METRICS_FILE, read_run_file, write_run_file
from recipes.runtime.watchdog import Watchdog
from recipes.tracking.goodput import GoodputLedger
from recipes.tracking.run_meters import RunMeters
from recipes.tracking.trackers import RunLogger, start
from recipes.training.callbacks.base import Callback
from recipes.training.callbacks.recorder import Recorder
from recipes.training.callbacks.step_progress import Progress
from recipes.training.guards.run_guards import RunGuards
from recipes.training.training_loop import Loop

STOPPED = 130


def run_job(
    job: Job,
    config: RunConfig,
    values: dict[str, Any],
    started: float,
    conclude: Callable[[Path], None] = lambda run: None,
) -> int:
    """Runs a checked job.

    Args:
        job: The job.
        config: The typed config.
        values: The same as composed, for ``config.yaml`` and the charts.
        started: When the command started, by `steady_time`.
        conclude: Called on rank 0 with the run's directory when the job has ended and all is closed.

    Returns:
        The exit code: 0 when the job came to its end, 130 when it was asked to stop and has saved.
    """
    engine = engine_classes()[config.engine.name](config.engine)
    store = launch_store()
    if store is not None:  # before process groups, whose making hangs where ranks disagree about them
        _agree_on_start(store, engine, values)
    engine.open()
    try:
        heartbeat = _heartbeat(config, engine)
        with contextlib.ExitStack() as claimed, heartbeat.job():
            if store is None:
                _agree_on_start(group_store(), engine, values)
            # Dropout and the like differ between ranks; weights do not come from this state.
            torch.manual_seed(config.seed + engine.rank)
            _quiet_libraries()
            heartbeat.beat("choosing the run's directory")
            run_dir = _agree_on_run_dir(engine, config, claimed)
            _make_run_dir(engine, run_dir, values)
            heartbeat.writes_to(run_dir.path)
            try:
                code = _run_open(job, config, values, engine, run_dir, heartbeat, started)
            except UserError:
                if engine.rank == 0 and not run_dir.resumed:
                    discard_unused(run_dir.path)
                raise
    finally:
        engine.close()
    if code == 0 and engine.rank == 0:
        conclude(run_dir.path)
    return code


def _run_open(
    job: Job,
    config: RunConfig,
    values: dict[str, Any],
    engine: Engine[Any],
    run_dir: RunDir,
    heartbeat: Heartbeat,
    started: float,
) -> int:
    heartbeat.beat("starting the tracker")
    tracker_id = None
    if engine.rank == 0:
        tracker_id = read_run_file(run_dir.path).get("wandb_run_id")
    tracker = start(config.tracker, run_dir.path, run_dir.name, values, tracker_id, engine.rank)
    if engine.rank == 0:
        write_run_file(run_dir.path, wandb_run_id=tracker.run_id, recipe=config.job, started=steady_time())
    logger = RunLogger(run_dir.path, tracker, engine.rank)
    ledger = GoodputLedger(run_dir.path, started) if engine.rank == 0 else None
    callbacks: list[Callback] = [Recorder(logger, ledger)]
    if engine.rank == 0:
        callbacks.append(Progress(config.train.log_every))
    meters = RunMeters(engine.device, first_on_machine=engine.first_on_machine)
    spent: dict[str, float] = {}
    try:
        with StopRequest(verbose=engine.rank == 0) as stop:
            guards = RunGuards(config.faults, run_dir.path, heartbeat)
            loop = Loop(engine, callbacks, stop, meters, guards)
            spent = loop.spent
            session = Session(config, values, engine, run_dir, stop, logger, loop, started, ledger)
            finished = job.run(session)
            if not finished:
                session.console.log(f"stopped and saved; go on with: resume={run_dir.path}")
        heartbeat.beat("closing the run's records")
    except BaseException as error:
        # Errors that are reported to the user, and a second Ctrl-C, are no failures that a run recovers from.
        failed = not isinstance(error, GraftError | KeyboardInterrupt)
        with contextlib.suppress(DiskError):  # the first error is the one to tell
            _close(logger, ledger, spent, failed=failed)
        raise
    _close(logger, ledger, spent, failed=False)
    return 0 if finished else STOPPED


def _close(logger: RunLogger, ledger: GoodputLedger | None, spent: dict[str, float], *, failed: bool) -> None:
    try:
        if ledger is not None:
            ledger.close(spent, failed=failed)
    finally:
        logger.finish()


def _make_run_dir(engine: Engine[Any], run_dir: RunDir, values: dict[str, Any]) -> None:
    """Makes the run directory, and tries on every rank to write to it, as all of them write checkpoints."""
    ranks = Ranks(None)

    def make() -> None:
        if engine.rank:
            return
        run_dir.path.mkdir(parents=True, exist_ok=True)
        launch = Launch.of_this_process()
        # First of all: killed from here on, it is found again.
        write_run_file(run_dir.path, run_id=run_dir.run_id, **(launch.record() if launch else {}))
        if not run_dir.resumed:  # else when the resume has turned out to be allowed
            atomic_write_text(run_dir.path / "config.yaml", to_yaml(values))

    def probe() -> None:
        path = run_dir.path / f".tmp-rank-{engine.rank:05d}"
        write_synced(path, b"")
        path.unlink()

    ranks.together(f"making {run_dir.path}", make)
    ranks.together(f"writing to {run_dir.path}", probe)
    if engine.rank == 0:
        print(f"run: {run_dir.path}" + (" (going on)" if run_dir.resumed else ""), flush=True)
        if run_dir.resumed and not (run_dir.path / METRICS_FILE).exists():
            print(f"run: its {METRICS_FILE} is gone; its curves begin with what is trained now", flush=True)
        if (line := engine.describe()) is not None:
            print(line, flush=True)


def _agree_on_start(store: Store, engine: Engine[Any], values: dict[str, Any]) -> None:
    """Refuses ranks that were started differently."""
    require_agreement(store, engine.rank, engine.world_size, facts_of_this_rank(values))


def _heartbeat(config: RunConfig, engine: Engine[Any]) -> Heartbeat:
    if config.faults.hang_s is None and config.faults.phase_hang_s is None:
        return Heartbeat()
    return Watchdog(engine.rank, engine.world_size, group_store(), config.faults)


def _agree_on_run_dir(engine: Engine[Any], config: RunConfig, claimed: contextlib.ExitStack) -> RunDir:
    """Returns the run directory that rank 0 chooses and claims; all raise its error."""
    decided: RunDir | UserError | None = None
    if engine.rank == 0:
        try:
            chosen = claim_run_dir(config, Launch.of_this_process(), claimed)
            decided = dataclasses.replace(chosen, run_id=run_id_of(chosen))
        except UserError as error:
            decided = error
    decided = engine.broadcast(decided)
    if isinstance(decided, UserError):
        raise decided
    assert decided is not None
    return decided


def _quiet_libraries() -> None:
    """Silences progress bars and advice of transformers, which would interrupt ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
