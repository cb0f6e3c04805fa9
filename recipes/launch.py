"""Command line of a run: compose the config, check it, open the engine, run the job.

All mistakes of a command are found at once: process groups, big files and downloads come after every check.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe.errors import ConfigError, GraftError, Mistake, UserError
from recipes.config.compose import compose_config, to_yaml, with_recipe
from recipes.config.run_flags import HELP, RunFlags, read_flags
from recipes.runtime.clock import steady_time
from recipes.runtime.error_file import write_error_file
from recipes.runtime.interrupt import INTERRUPTED, end_by_signal, restored_handlers
from recipes.runtime.lost_rank import lost_rank, speaks_for_the_rest
from recipes.runtime.quiet_libraries import quiet_libraries
from recipes.runtime.source_root import TRAIN
from recipes.runtime.system_errors import Remedies, system_sentence

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig

# Time that other ranks give the first one of their machine to report an error that all have.
_SPEAK_FIRST_S = 20.0
_REMEDIES = Remedies(
    memory="Set a smaller train.micro_batch_size, engine.activation_checkpointing=true or more ranks, then "
    "resume=auto.",
    limit="Raise the limit, then set resume=auto.",
    full="Free some, or set output_dir and cache_dir.",
    file="It was there, or could be used, when the run was checked: put it back, then set resume=auto.",
)

_HELP = """\
usage: graft train [--nproc N] [+recipe=NAME] [OPTION=VALUE ...]
       torchrun --nproc-per-node=N train.py [+recipe=NAME] [OPTION=VALUE ...]

  +recipe=quick                        all of the next with a toy model, in a minute
  +recipe=upcycle                      dense checkpoint -> MoE model -> training, report, export; the default
  dense=/path/to/hf/checkpoint         the dense model (without: a small default is trained first)
  data.path=/path/to/*.jsonl           text, jsonl, parquet, or a Megatron .bin/.idx prefix
  upcycle.num_experts=8 router.top_k=2 ... every option: graft train --cfg
  resume=auto                          go on with the newest run from its newest complete checkpoint


The README and docs/options.md say more; graft doctor says what this machine can run.
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
        before, after = _HELP.rsplit("\n\n", 1)
        print(f"{before}\n\n{HELP}\n{after}")
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
        if (said := system_sentence(error, _REMEDIES)) is None:
            raise
        return _report([said[0]], said[1])


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
    flags = _with_recipe(read_flags(arguments))
    if flags.complete or flags.info or flags.cfg:
        _show(flags)
        return 0
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ
    if is_rank and (flags.multirun or flags.ranks):
        flag = "--multirun" if flags.multirun else "--nproc"
        rule = "torchrun has started the ranks already"
        raise ConfigError.one(
            "command line", flag, rule, "Run it without torchrun: graft train --nproc N ..."
        )
    if flags.multirun:
        from recipes.jobs.multirun import run_sweep

        return run_sweep(flags.overrides, flags.ranks, flags.restarts, _certify_mistakes)
    from recipes.jobs.checked_run import check_command

    run = check_command(flags.overrides, flags.ranks, _certify_mistakes)
    run.check_models()
    conclude = _certifier(run.config)
    if os.environ.get("RANK", "0") == "0":
        for line in run.fetched.lines:
            print(line, file=sys.stderr, flush=True)
    if flags.ranks is not None and (flags.ranks > 1 or flags.restarts):
        from recipes.runtime.local_ranks import start_ranks

        return start_ranks(flags.ranks, [*TRAIN, *run.rank_overrides], flags.restarts)
    from recipes.jobs.session import run_job

    if os.environ.get("RANK", "0") == "0" and (idle := run.idle):
        print(idle, file=sys.stderr, flush=True)
    return run_job(run.job, run.config, run.values, started, *conclude)


def _certifier(config: RunConfig) -> list[Callable[[Path], None]]:
    """Returns what certifies the export at the end of the run, if that is asked for; checks that it can."""
    from recipes.config.sections.certify_config import CertifyConfig

    if not config.section(CertifyConfig).programs:
        return []
    from recipes.cap.certify.certify_run import certifier

    return [certifier(config)]


def _certify_mistakes(config: RunConfig) -> Sequence[Mistake]:
    try:
        _certifier(config)
    except ConfigError as error:
        return error.mistakes
    return ()


def _with_recipe(flags: RunFlags) -> RunFlags:
    """Returns the flags with a recipe; says on rank 0 which one is taken where none is named."""
    if flags.complete:
        return flags
    overrides = with_recipe(flags.overrides)
    if overrides != flags.overrides and os.environ.get("RANK", "0") == "0":
        print(f"no recipe is named: {overrides[0]} (--list recipe has others)", file=sys.stderr, flush=True)
    return replace(flags, overrides=overrides)


def _show(flags: RunFlags) -> None:
    """Prints the config, or how it is composed."""
    if flags.cfg == "shown":
        from recipes.config.schema import parse_config

        values = compose_config(flags.overrides)
        parse_config(values)
        print(to_yaml(values))
        return
    from recipes.config.hydra_views import complete, config_text, show_info

    if flags.complete:
        complete(flags.overrides)
    elif flags.info:
        show_info(flags.info, flags.overrides)
    else:
        text = config_text(flags.cfg or "job", flags.overrides, flags.package, resolve=flags.resolve)
        print(text, end="")


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
