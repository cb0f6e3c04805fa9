"""Flags, checks, output and exit codes that all tools share.

Exit codes: 0 for success, 1 for failure, 2 for a user's mistake, 130 for an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from moe.errors import ConfigError, GraftError, Mistake, UserError
from recipes.runtime.extras import check_names
from recipes.runtime.hub import HUB, Fetched
from recipes.runtime.quiet_libraries import quiet_libraries
from recipes.runtime.system_errors import Remedies, system_sentence

INTERRUPTED = 130
_REMEDIES = Remedies(
    memory="Give the tool less to hold, or run it on a machine with more.",
    limit="Raise the limit.",
    full="Free some, or name another place.",
    file="Check the path, its permissions and the disk, then try again.",
)
#: Earlier spelling of a flag, in whichever tool, to its one spelling in all of them: ``--out`` is what is
#: written, ``--dtype`` a number format, ``--experts`` a count, ``--backend`` what computes them.
RENAMED = {
    "--output": "--out",
    "--precision": "--dtype",
    "--experts": "--backend",
    "--leg": "--stage",
    "--length": "--sequence-length",
    "seeds=": "--seeds",
    "routers=": "--routers",
    "lengths=": "--lengths",
}
STDOUT = "-"
# Flags of what is written.
_WRITTEN = ("out", "json", "figure")


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits. Errors of the user become lines on stderr; bugs keep their traceback.

    Args:
        main: Runs the command and returns its exit code.
    """
    quiet_libraries()
    try:
        code = main()
        sys.stdout.flush()
    except GraftError as error:
        code = error.exit_code
        lines = [str(m) for m in error.mistakes] if isinstance(error, UserError) else [str(error)]
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("error: interrupted.", file=sys.stderr)
    except BrokenPipeError:
        # The reader went away (such as `| head`): silence, also when Python flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (OSError, MemoryError, RuntimeError) as error:
        if (said := system_sentence(error, _REMEDIES)) is None:
            raise
        print(f"error: {said[0]}", file=sys.stderr)
        code = said[1]
    sys.exit(code)


class _HelpFormatter(argparse.HelpFormatter):
    """Formatter that adds the default of every flag that has one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # The example stays on a line, to be copied.
        words, mark, example = text.partition("example:\n")
        filled = super()._fill_text(words, width, indent) if words else ""
        return f"{filled}\n\n{mark}{example}".lstrip() if mark else filled

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        without = (
            action.default in (argparse.SUPPRESS, []) or action.default in (None, "") or action.nargs == 0
        )
        return text if without or "default" in text else f"{text} (default: %(default)s)"


class _ToolParser(argparse.ArgumentParser):
    """Parser that knows the earlier spelling of flags, and fetches what comes from the hub.

    Attributes:
        reads_weights: Whether the tool reads the weights of models, so that they are fetched as well.
    """

    reads_weights = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses flags; one that is spelled as it was before (`RENAMED`) is taken, with a line that says so.

        Raises:
            ConfigError: An argument is no UTF-8, or another package has the name of one of ours, which the
                doctor alone can live with.
        """
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if any("\ud800" <= character <= "\udfff" for character in word):
                rule, remedy = "it holds bytes that are not UTF-8", "Rename what it names."
                raise ConfigError.one("command line", word, rule, remedy)
        parsed = super().parse_known_args([self._present(word) for word in words], namespace)
        if not self.prog.endswith("doctor") and (mistakes := check_names()):
            raise ConfigError(mistakes)
        self._fetch(parsed[0])
        return parsed

    def _fetch(self, flags: argparse.Namespace) -> None:
        """Puts the places of what comes from the hub where its addresses are."""
        fetched = Fetched(code=getattr(flags, "trust_remote_code", False))
        shown = {action.dest: (action.option_strings or [action.metavar])[-1] for action in self._actions}
        for name, value in vars(flags).items():
            if isinstance(value, str) and value.startswith(HUB) and name in _WRITTEN:
                rule = "results are written on this machine"
                raise ConfigError.one(str(shown[name]), value, rule, "Name a folder here, then: hf upload.")
            if isinstance(value, list) and any(f"={HUB}" in str(element) for element in value):
                from recipes.config.compose import quoted

                value = [fetched.override(element, quoted) for element in value]
            setattr(flags, name, fetched.local(value, str(shown.get(name, name))))
        if self.reads_weights:
            fetched.fetch_weights()

    def _present(self, word: str) -> str:
        """Returns an argument with the present name of its flag."""
        own, (name, equals, value) = self._option_string_actions, word.partition("=")
        old = name if name.startswith("--") else name + equals
        new = RENAMED.get(old)
        if new not in own or old in own:
            return word
        print(f"warning: {old.rstrip('=')} is now called {new}", file=sys.stderr)
        return f"{new}={value.strip('[]')}" if equals else str(new)


def tool_parser(
    name: str, description: str, epilog: str | None = None, *, example: str, reads_weights: bool = True
) -> argparse.ArgumentParser:
    """Builds the parser of ``python -m tools.NAME``, with ``--json`` and an example at the end of its help.

    Args:
        name: The tool.
        description: What it does.
        epilog: What else there is to know.
        example: Arguments of a call that works.
        reads_weights: Whether it reads weights of models: those of the hub are fetched then.
    """
    end = f"example:\n  {program_name(name)} {example}"
    parser = _ToolParser(
        program_name(name),
        description=description,
        epilog=f"{epilog}\n\n{end}" if epilog else end,
        formatter_class=_HelpFormatter,
    )
    parser.reads_weights = reads_weights
    text = "write the figures as JSON to a file, or to stdout for -"
    parser.add_argument("--json", metavar="PATH", help=text)
    return parser


def program_name(name: str) -> str:
    """Returns how a tool was started: as ``graft NAME``, or as ``python -m tools.NAME``."""
    return sys.argv[0] if sys.argv[0].startswith("graft ") else f"python -m tools.{name}"


def check_json_target(target: str | None) -> list[Mistake]:
    """Checks the value of ``--json`` before the work whose figures go there."""
    if target is None or not Path(target).is_dir():
        return []
    return [Mistake("--json", target, "is a folder", "Name a file in it, or give - for stdout.")]


def check_least(arguments: argparse.Namespace, **least: float) -> list[Mistake]:
    """Checks the minimum of numeric flags, by the names of their values; None passes."""
    given = {name: getattr(arguments, name) for name in least}
    return [
        Mistake(_flag(name), value, f"it must be {least[name]:g} or more", "Raise it.")
        for name, value in given.items()
        if value is not None and value < least[name]
    ]


def check_positive(arguments: argparse.Namespace, *names: str) -> list[Mistake]:
    """Checks that numeric flags are finite and above 0, by the names of their values; None passes."""
    given = {name: getattr(arguments, name) for name in names}
    return [
        Mistake(_flag(name), value, "it must be above 0", "Raise it.")
        for name, value in given.items()
        if value is not None and not 0 < value < float("inf")
    ]


def check_existing_folder(flag: str, folder: str | None) -> list[Mistake]:
    """Checks that a folder exists where one is named."""
    if folder is None or Path(folder).is_dir():
        return []
    return [Mistake(flag, folder, "there is no such folder", "Create it, or name another.")]


def read_numbers(flag: str, text: str) -> tuple[list[int], list[Mistake]]:
    """Reads numbers above 0 with commas between; returns them, and a mistake for each other part."""
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not word.isdigit() or int(word) < 1]
    remedy = "Write numbers with commas: 1,2,4."
    mistakes = [Mistake(flag, text, f"{word!r} is not a whole number above 0", remedy) for word in wrong]
    return [int(word) for word in words if word not in wrong], mistakes


def read_config(given: str, remedy: str) -> tuple[dict[str, Any], list[Mistake]]:
    """Reads a ``config.json``, or the one in a folder; returns its content, and the mistakes."""
    path = Path(given).expanduser()
    path = path / "config.json" if path.is_dir() else path
    from recipes.runtime.user_json import UserJsonError, read_json_file

    try:
        content = read_json_file(path)
    except UserJsonError as error:
        rule = f"it {error.clause}"
    else:
        if isinstance(content, dict):
            return content, []
        rule = "it holds no mapping"
    return {}, [Mistake("CONFIG", str(path), rule, remedy)]


def check_format(target: str, formats: Mapping[str, Any]) -> list[Mistake]:
    """Checks the value of ``--target``: a format of `recipes.models.export.exporters`, or ``auto``."""
    if target in ("auto", *formats):
        return []
    return [Mistake("--target", target, "there is no such format", f"Choose auto, {', '.join(formats)}.")]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def stream_beside(target: str | None) -> TextIO:
    """Returns the stream for people: stderr where the figures of ``--json`` go to stdout."""
    return sys.stderr if target == STDOUT else sys.stdout


def log_beside(target: str | None) -> Callable[..., None]:
    """Returns a function that prints to `stream_beside` at once."""
    return partial(print, file=stream_beside(target), flush=True)


def machine_figures() -> dict[str, str | int | None]:
    """Returns processor and number of cores, for figures that depend on them."""
    return {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def write_json(target: str | None, figures: Mapping[str, Any]) -> None:
    """Writes figures to the target of ``--json``: a file, replaced whole; stdout for ``-``; nowhere for None.

    Raises:
        DiskError: The file cannot be written.
    """
    if target == STDOUT:
        print(json.dumps(figures, indent=2))
    elif target is not None:
        from recipes.runtime.atomic import atomic_write_json

        atomic_write_json(target, figures)
