"""Identity of a run: the options that decide what its weights mean, and that a resume may not change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import CheckpointError, Mistake, UserError
from recipes.config.compose import to_yaml
from recipes.config.renamed import with_new_names
from recipes.config.schema import RunConfig
from recipes.data.config import DataConfig
from recipes.data.indexed import bin_path, idx_path
from recipes.data.sources import resolve
from recipes.data.tokenizer import tokenizer_files
from recipes.jobs.changed_options import changed_options
from recipes.jobs.run_dir import RunDir, choose_run_dir
from recipes.jobs.top_k_schedules import top_k_schedule_identity
from recipes.runtime.atomic import atomic_write_text
from recipes.runtime.relaunch import Launch
from recipes.runtime.run_file import read_run_file, write_run_file

if TYPE_CHECKING:
    from recipes.data.build_data import TrainData

_REMEDY = "Set it back to go on, or start a new run with resume=none."
# Where nothing that is written down has changed.
_UNKNOWN = "the tokens themselves, though options, files and tokenizer are those of then (another version?)"
_SHOWN = 3
# An option whose absence means something else than its default.
_SINCE = "data.document_mask"
# More files are not listed one by one.
_MOST_FILES = 2000


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
    return {**_of_options(config, of_job or {}), "dense": str(dense), "data": data.fingerprint}


def check_resumed(config: RunConfig, of_job: Mapping[str, Any]) -> list[Mistake]:
    """Checks that the run that is gone on with began with these options; its data are looked at later.

    Args:
        config: The run.
        of_job: As for `identity`.
    """
    if os.environ.get("RANK", "0") != "0":
        return []
    try:
        origin = _origin(choose_run_dir(config, Launch.of_this_process()))
    except (UserError, OSError, ValueError):
        return []  # `recipes.jobs.option_rules.check_run_dir` says so
    try:
        began = read_run_file(origin).get("identity")
    except CheckpointError as error:
        return list(error.mistakes)
    if began is None:
        return []
    began = {path: value for path, value in with_new_names(began).items() if path not in ("dense", "data")}
    return _changes(origin, began, _of_options(config, of_job))


def _of_options(config: RunConfig, of_job: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        **of_job,
        "data.seq_len": config.data.seq_len,
        "optim.name": config.optim.name,
        "train.global_batch_size": config.train.global_batch_size,
        **_of_model(config),
    }
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain


def _of_model(config: RunConfig) -> dict[str, Any]:
    """Returns the values that decide what the weights of a checkpoint compute."""
    fields: dict[str, Any] = {"seed": config.seed}
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
    return fields


def check_config_file(config: RunConfig, began: Mapping[str, Any], path: Path) -> list[Mistake]:
    """Checks that a run's ``config.yaml``, which somebody may have changed, describes the model it trains.

    Args:
        config: What the file says.
        began: Identity that the run wrote down.
        path: The file.
    """
    began, says = with_new_names(began), json.loads(json.dumps(_of_model(config)))
    lost = {key for key in began if key not in says and key.startswith(("attention.", "experts.lora."))}
    rule = f"{path} has it, and the run began with"
    return [
        Mistake(key, says.get(key), f"{rule} {began[key]!r}", "Restore the file.")
        for key in sorted(says.keys() & began.keys() | lost)
        if says.get(key) != began[key]
    ]


def data_parts(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Returns the options and files that decide a run's data, so that a refusal can name what has changed.

    Args:
        config: The run.
        folder: Its dense model, whose tokenizer it takes; the default model and its tokenizer are made by
            options.
    """
    data = config.data
    options = {f"data.{key}": value for key, value in dataclasses.asdict(data).items()}
    if any(resolve(own).kind == "stdlib" for own in data.sources()):
        options["the version of Python, whose library is the text,"] = platform.python_version()
    if config.dense is None:
        options |= {f"model.{key}": value for key, value in dataclasses.asdict(config.model).items()}
    named = [data.of(own.validation_path) for own in data.sources() if own.validation_path is not None]
    paths = {path for one in (*data.sources(), *named) for path in _on_disk(one)}
    stats = {str(path): path.stat() for path in sorted(paths)}
    if len(paths) > _MOST_FILES:
        options["the number of files"], options["their bytes"] = (
            len(paths),
            sum(s.st_size for s in stats.values()),
        )
        stats = {}
    parts = {
        "options": options,
        "files": {path: stat.st_size for path, stat in stats.items()},
        "contents": {str(path): _digest(path) for path in _deciding(config, folder)},
        "times": {path: stat.st_mtime_ns for path, stat in stats.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain


def _deciding(config: RunConfig, folder: Path) -> list[Path]:
    """Returns the files of the dense model's tokenizer, and that of the chat template."""
    trust = config.trust_remote_code
    named = [] if config.dense is None else tokenizer_files(folder, trust_remote_code=trust)
    named += [Path(config.data.chat_template).expanduser()] if config.data.chat_template else []
    return [path for path in named if path.is_file()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _on_disk(config: DataConfig) -> list[Path]:
    sources = resolve(config)
    if sources.kind == "indexed":
        return [bin_path(sources.files[0]), idx_path(sources.files[0])]
    return list(sources.files)


def data_changes(then: Any, now: Mapping[str, Any]) -> str:
    """Names what differs between the data of then and now, the first few of many.

    Args:
        then: Parts that a run wrote down, see `data_parts`; of any kind where somebody has edited them.
        now: The same of now.
    """
    found: list[str] = []
    for kind, unit in (("options", ""), ("files", " bytes"), ("contents", ""), ("times", "")):
        if not isinstance(then, Mapping) or kind not in now:
            break
        old, new = then.get(kind), now[kind]
        if not isinstance(old, Mapping) or (kind == "times" and found):
            continue
        # Options that a version of then did not write down are not new ones.
        if kind == "options" and new.get(_SINCE) and _SINCE not in old:
            found.append(f"{_SINCE} was not there yet, which is false, and is true")
        for name in sorted(old.keys() & new.keys() if kind == "options" else old.keys() | new.keys()):
            if name not in new:
                found.append(f"{name} is gone")
            elif name not in old:
                found.append(f"{name} is new")
            elif old[name] != new[name] and kind in ("contents", "times"):
                found.append(
                    f"{name} {'holds something else' if kind == 'contents' else 'was written to since'}"
                )
            elif old[name] != new[name]:
                found.append(f"{name} was {old[name]!r}{unit} and is {new[name]!r}")
    more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "; ".join([*found[:_SHOWN], *more]) or _UNKNOWN


def refuse_changes(
    run_dir: RunDir,
    wanted: dict[str, Any],
    values: Mapping[str, Any],
    parts: Mapping[str, Any] | None = None,
) -> str:
    """Compares a run's identity with the one it began with, and writes it and the config down. For rank 0.

    A resume that is refused leaves the run's ``config.yaml`` as it was. Returns the options that may change
    and have, see `changed_options`.

    Args:
        run_dir: The run directory.
        wanted: Identity of the config that is asked for.
        values: That config, as composed.
        parts: Parts of its data, see `data_parts`.

    Raises:
        CheckpointError: A field has changed; every one is named with both values.
    """
    origin = _origin(run_dir)
    record = read_run_file(origin)
    began = record.get("identity")
    if began is not None:
        began = with_new_names(began)
        changes = data_changes(record.get("data_parts"), parts or {})
        # Their values are hashes, or named by one: a person is told what has changed.
        hashed = {"data": "other data"}
        if values.get("dense") is None and "model.vocab_size" in str(record.get("data_parts")):
            hashed["dense"] = "another default model"
        changed = [
            Mistake(one.path, changes, f"the run in {origin} began with {hashed[one.path]}", _REMEDY)
            if one.path in hashed
            else one
            for one in _changes(origin, began, wanted)
        ]
        if changed:
            raise CheckpointError(changed)
    changed_now = changed_options(run_dir, values)
    # A run that is killed before its first checkpoint starts from there again.
    more: dict[str, Any] = {} if run_dir.fork is None else {"fork": str(run_dir.fork)}
    more |= {} if parts is None else {"data_parts": parts}
    write_run_file(run_dir.path, identity=wanted, **more)
    atomic_write_text(run_dir.path / "config.yaml", to_yaml(dict(values)))
    return changed_now


def _origin(run_dir: RunDir) -> Path:
    """Returns the directory of the run that is gone on with, or that a new run starts from."""
    return run_dir.path if run_dir.fork is None else run_dir.fork.parent.parent


def _changes(origin: Path, began: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Mistake]:
    return [
        Mistake(path, wanted.get(path), f"the run in {origin} began with {began.get(path)!r}", _REMEDY)
        for path in sorted(set(began) | set(wanted))
        if began.get(path) != wanted.get(path)
    ]
