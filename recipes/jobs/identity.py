"""Identity of a run: the options that decide what its weights mean, and that a resume may not change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError, Mistake
from recipes.config.compose import to_yaml
from recipes.config.renamed import with_new_names
from recipes.config.schema import RunConfig
from recipes.data.build_data import TrainData
from recipes.jobs.run_dir import RunDir
from recipes.jobs.top_k_schedules import top_k_schedule_identity
from recipes.runtime.atomic import atomic_write_text
from recipes.runtime.run_file import read_run_file, write_run_file

_REMEDY = "Set it back to go on, or start a new run with resume=none."
_DATA_REMEDY = (
    "The files of data.path, or how they are split, are not those of then: put them back to go on, or start "
    "a new run with resume=none."
)


def identity(
    config: RunConfig, dense: Path, data: TrainData, of_job: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the values that a checkpoint depends on, by config path.

    Args:
        config: The run.
        dense: Folder of its dense model.
        data: Its data.
        of_job: Options of the job's own (`recipes.jobs.base.Job.identity`).
    """
    fields: dict[str, Any] = {
        **(of_job or {}),
        "dense": str(dense),
        "data": data.fingerprint,
        "data.seq_len": config.data.seq_len,
        "seed": config.seed,
        "optim.name": config.optim.name,
        "train.global_batch_size": config.train.global_batch_size,
    }
    for section in ("router", "upcycle"):
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            fields[f"{section}.{key}"] = value
    if config.attention is not None:
        for key, value in dataclasses.asdict(config.attention).items():
            fields[f"attention.{key}"] = value
    if config.experts.lora.rank:
        for key, value in dataclasses.asdict(config.experts.lora).items():
            fields[f"experts.lora.{key}"] = value
    fields["top_k_schedule"] = top_k_schedule_identity(config)
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain


def refuse_changes(run_dir: RunDir, wanted: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Compares a run's identity with the one it began with, and writes it and the config down. For rank 0.

    A resume that is refused leaves the run's ``config.yaml`` as it was.

    Args:
        run_dir: The run directory.
        wanted: Identity of the config that is asked for.
        values: That config, as composed.

    Raises:
        CheckpointError: A field has changed; every one is named with both values.
    """
    origin = run_dir.path if run_dir.fork is None else run_dir.fork.parent.parent
    began = read_run_file(origin).get("identity")
    if began is not None:
        began = with_new_names(began)
        changed = [
            Mistake(
                path,
                wanted.get(path),
                f"the run in {origin} began with {began.get(path)!r}",
                _DATA_REMEDY if path == "data" else _REMEDY,
            )
            for path in sorted(set(began) | set(wanted))
            if began.get(path) != wanted.get(path)
        ]
        if changed:
            raise CheckpointError(changed)
    # A run that is killed before its first checkpoint starts from there again.
    fork = {} if run_dir.fork is None else {"fork": str(run_dir.fork)}
    write_run_file(run_dir.path, identity=wanted, **fork)
    atomic_write_text(run_dir.path / "config.yaml", to_yaml(dict(values)))
