"""Reads the flags of ``train.py``, which may stand anywhere among the overrides."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from moe.errors import ConfigError
from recipes.config.compose import quoted
from recipes.config.search_path import SEARCH_PATH

HELP = """\
  --nproc N          start N ranks on this machine
  --max-restarts N   start them again after a failure, at most N times
  -m, --multirun     a run for each combination: router=topk,sigmoid 'train.steps=range(100,500,100)'
  --cfg              print the resolved config, checked, and end
  --cfg job|hydra|all [-p PACKAGE] [--resolve]
                     print it as hydra composes it, or one package of it
  --info [all|config|defaults|defaults-tree|plugins|searchpath]
                     print how hydra composes it
  -cd DIR            a further folder of recipes and choices, as hydra.searchpath=[DIR]; conf/ here is one
  -sc install=SHELL  print shell completion: eval "$(graft train -sc install=bash)"
  -h, --help [OPTION]
                     print this, or what an option means: --help train.async_save, --help optim
  --list [GROUP]     print what can be chosen, with a line each: --list router
"""
_SHOWN = "shown"
_CONFIGS = ("job", "hydra", "all")
_INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# Each may be followed by one of its words, or by an override.
_OPTIONAL = {
    "--cfg": (_SHOWN, _CONFIGS),
    "-c": (_SHOWN, _CONFIGS),
    "--info": ("all", _INFOS),
    "-i": ("all", _INFOS),
}


@dataclass(frozen=True)
class RunFlags:
    """Command line of a run.

    Attributes:
        overrides: Everything but flags.
        cfg: ``shown``, or hydra's ``job``, ``hydra`` or ``all``; None to train.
        package: Part of the config that is printed.
        resolve: Whether interpolations are resolved in what is printed.
        info: What to print of how the config is composed.
        complete: Whether the overrides are commands of shell completion.
        multirun: Whether commas separate runs.
        ranks: Ranks to start; None to be the only one, or one of torchrun's.
        restarts: How often they are started again.
    """

    overrides: tuple[str, ...]
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    info: str | None = None
    complete: bool = False
    multirun: bool = False
    ranks: int | None = None
    restarts: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError.one("command line", message, "it cannot be read", "See graft train --help.")


def read_flags(arguments: Sequence[str]) -> RunFlags:
    """Reads a command line.

    Raises:
        ConfigError: There is no such flag, or its value is none.
    """
    given, rest = _parser().parse_known_args(_with_words(arguments))
    if flag := next((argument for argument in rest if argument.startswith("-")), None):
        raise ConfigError.one("command line", flag, "there is no such flag", "See graft train --help.")
    for name, least in (("nproc", 1), ("max_restarts", 0)):
        if (value := getattr(given, name)) is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError.one(flag, value, f"it must be {least} or more", "Raise it.")
    if given.package and not given.cfg:
        raise ConfigError.one(
            "--package", given.package, "it is a part of what --cfg prints", "Add --cfg job."
        )
    folders = ",".join(quoted(folder) for folder in given.config_dir)
    return RunFlags(
        overrides=(*rest, *([f"{SEARCH_PATH}=[{folders}]"] if folders else [])),
        cfg=given.cfg,
        package=given.package,
        resolve=given.resolve,
        info=given.info,
        complete=given.shell_completion,
        multirun=given.multirun,
        ranks=given.nproc,
        restarts=given.max_restarts or 0,
    )


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--nproc", "--nproc-per-node", type=int)
    add("--max-restarts", type=int)
    add("--multirun", "-m", action="store_true")
    add("--cfg", "-c", choices=(_SHOWN, *_CONFIGS))
    add("--package", "-p")
    add("--resolve", action="store_true")
    add("--info", "-i", choices=_INFOS)
    add("--config-dir", "-cd", action="append", default=[])
    add("--shell-completion", "-sc", action="store_true")
    return parser


def _with_words(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with the word of each flag that may stand without one."""
    found: list[str] = []
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        default, words = _OPTIONAL.get(argument, ("", ()))
        found += [argument] if not words or after in words else [f"{argument}", default]
    return found
