"""Command line of a run: compose the config, check it, open the engine, run the job.

All mistakes of a command are found at once: process groups, big files and downloads come after every check.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from moe.errors import ConfigError, GraftError, UserError
from recipes.config.compose import compose_config, to_yaml
from recipes.runtime.clock import steady_time
from recipes.runtime.error_file import write_error_file
from recipes.runtime.interrupt import end_by_signal, restored_handlers
from recipes.runtime.lost_rank import lost_rank, speaks_for_the_rest
from recipes.runtime.machine_memory import LimitError, is_out_of_memory
from recipes.runtime.quiet_libraries import quiet_libraries

INTERRUPTED = 130
# Time that other ranks give the first one of their machine to report an error that all have.
_SPEAK_FIRST_S = 20.0
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Errors of a file or folder that was removed or unmounted meanwhile.
_GONE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR)

_HELP = """\
usage: torchrun --nproc-per-node=N train.py +recipe=NAME [OPTION=VALUE ...]

  +recipe=quick                        all of the next with a toy model, in a minute
  +recipe=upcycle                      dense checkpoint -> MoE model -> training, report, export
  dense=/path/to/hf/checkpoint         the dense model (without: a small default is trained first)
  data.path=/path/to/*.jsonl           text, jsonl, parquet, or a Megatron .bin/.idx prefix
  upcycle.num_experts=8 router.top_k=2 ... every option: train.py --cfg +recipe=upcycle
  resume=auto                          go on with the newest run from its newest complete checkpoint

  --cfg            print the resolved config and end
  --help [OPTION]  print this, or what an option means: --help train.async_save, --help optim
  --list [GROUP]   print what can be chosen, with a line each: --list router

The README and docs/options.md say more; python -m tools.doctor says what this machine can run.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed, 2 a user's mistake, 130 stopped."""
    started = _command_started()
    quiet_libraries()
    if {"--help", "-h", "--list"} & set(arguments):
        return _guarded(lambda: _tell(arguments))
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        # A mapped file that shrinks while it is read ends a process by a signal: then its stack is shown.
        faulthandler.enable(sys.__stderr__)
    try:
        with restored_handlers():
            return _guarded(lambda: _run(arguments, started))
    except KeyboardInterrupt:
        if _verbose():
            print("interrupted: whatever checkpoints there are, are complete", file=sys.stderr)
        return INTERRUPTED


def _tell(arguments: Sequence[str]) -> int:
    """Prints the help, or what it has on options and groups that are named."""
    topics = [argument for argument in arguments if not argument.startswith("-")]
    listed = "--list" in arguments
    if not topics and not listed:
        print(_HELP)
        return 0
    from recipes.config.reference import answer, choices

    lines = [line for topic in topics or [""] for line in choices(topic)] if listed else [answer(topics)]
    print("\n".join(lines))
    return 0


def end_process(code: int) -> NoReturn:
    """Ends the process once everything is closed and written.

    The interpreter is not taken apart: torch's own threads (gloo, autograd) that reach for it meanwhile
    abort the process ("terminate called without an active exception"), and a run that is finished and saved
    would count as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except GraftError as error:
        if (line := lost_rank(error)) is not None:
            return _report([line], error.exit_code, speaks=speaks_for_the_rest())
        lines = [str(m) for m in error.mistakes] if isinstance(error, UserError) else [str(error)]
        return _report(lines, error.exit_code)
    except (MemoryError, RuntimeError, OSError) as error:
        if (line := lost_rank(error)) is not None:
            return _report([line], 1, speaks=speaks_for_the_rest())
        if is_out_of_memory(error):
            return _report([_memory_line(error)], 1)
        line = _disk_line(error) if isinstance(error, OSError) else None
        if line is None:
            raise
        return _report([line], 2)


def _memory_line(error: Exception) -> str:
    if isinstance(error, LimitError):
        return f"{error}. Raise the limit, then set resume=auto."
    cause = str(error).strip().partition("\n")[0] or "memory is used up"
    return (
        f"not enough memory, in {_place(error)}: {cause}. Set a smaller train.micro_batch_size, "
        "engine.activation_checkpointing=true or more ranks, then resume=auto."
    )


def _disk_line(error: OSError) -> str | None:
    """Returns a sentence about a disk that is full or has changed; None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}. Free some, or set output_dir and cache_dir."
    if error.errno in _GONE and error.filename:
        return (
            f"{error.filename}: {error.strerror}, in {_place(error)}. It was there, or could be used, "
            "when the run was checked: put it back, then set resume=auto."
        )
    return None


def _place(error: Exception) -> str:
    """Returns the innermost line of ours in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"{os.path.relpath(frame.filename, _ROOT)}:{frame.lineno} {frame.name}"


def _report(lines: list[str], code: int, speaks: bool | None = None) -> int:
    """Prints errors on the first rank of a machine; the others wait until torchrun ends them."""
    if not (_verbose() if speaks is None else speaks):
        end_by_signal()
        threading.Event().wait(_SPEAK_FIRST_S)
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)
    write_error_file("\n".join(lines))
    return code


def _verbose() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _command_started() -> float:
    """Returns the start of torchrun, or of this process where there is none.

    A process that torchrun has started again begins by itself.
    """
    import psutil

    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        process = process.parent() or process
    return min(process.create_time(), steady_time())


def _run(arguments: Sequence[str], started: float) -> int:
    overrides = [argument for argument in arguments if argument != "--cfg"]
    flags = [argument for argument in overrides if argument.startswith("-")]
    if flags:
        raise ConfigError.one("command line", flags[0], "there is no such flag", "See train.py --help.")
    values = compose_config(overrides)
    from recipes.config.schema import parse_config

    if "--cfg" in arguments:
        parse_config(values)
        print(to_yaml(values))
        return 0
    try:
        config = parse_config(values)
    except ConfigError as error:
        from recipes.config.places import check_places

        raise ConfigError([*error.mistakes, *check_places(values)]) from None
    from recipes.jobs import job_classes

    jobs = job_classes()
    if config.job not in jobs:
        raise ConfigError.one("job", config.job, "there is no such job", f"One of {', '.join(jobs)}.")
    job = jobs[config.job]()
    mistakes = job.check(config, int(os.environ.get("WORLD_SIZE", "1")))
    if mistakes:
        raise ConfigError(mistakes)
    from recipes.jobs.idle_options import idle_line
    from recipes.jobs.session import run_job

    if os.environ.get("RANK", "0") == "0" and (line := idle_line(overrides, values, config, jobs)):
        print(line, file=sys.stderr, flush=True)
    return run_job(job, config, values, started)
