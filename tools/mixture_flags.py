"""Flags and checks that all tools on mixtures share."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from tools.command import check_existing_folder, check_json_target, check_least

if TYPE_CHECKING:
    from recipes.data.config import DataConfig
    from recipes.upcycling.reduce.text_look import TextRequest


def add_mixture_flags(parser: argparse.ArgumentParser, *, keeps: bool = True) -> None:
    """Adds the mixture and the folder to write; with ``keeps``, the number of experts that stay."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the mixture: docs/continue.md lists the families")
    if keeps:
        add("--keep", type=int, required=True, metavar="E", help="experts that each layer keeps")
    add("--out", required=True, metavar="DIR", help="folder to write; must not exist")


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the text that a mixture reads."""
    add = parser.add_argument
    add("--text", metavar="PATH", help="text to look at; a part is held out (default: Python's library)")
    add("--samples", type=int, default=64, metavar="N", help="samples to look at (default 64)")
    add("--sequence-length", type=int, default=256, metavar="S", help="tokens of a sample (default 256)")
    add("--trust-remote-code", action="store_true", help="run code that the folder brings (auto_map)")


def text_config(arguments: argparse.Namespace) -> DataConfig:
    """Returns the data that the flags of `add_text_flags` ask for, before they are checked."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from recipes.data.config import DataConfig

    return DataConfig(path=arguments.text, seq_len=max(1, arguments.sequence_length))


def check_mixture(arguments: argparse.Namespace, data: DataConfig, **least: float) -> list[Mistake]:
    """Finds mistakes in a mixture, its text and ``--json``, and numbers below their minimum."""
    from recipes.data.sources import check_paths
    from recipes.models.hf.inspection import check_checkpoint

    mistakes = check_json_target(arguments.json)
    mistakes += [replace(mistake, path="--text") for mistake in check_paths(data)]
    missing = check_existing_folder("MODEL", arguments.model)
    trust = arguments.trust_remote_code
    mistakes += missing or check_checkpoint(arguments.model, "MODEL", trust_remote_code=trust)
    return mistakes + check_least(arguments, **least, samples=1, sequence_length=1)


def read_source(arguments: argparse.Namespace, **least: float) -> tuple[TextRequest, Path, Path]:
    """Checks the flags of a mixture, its text and the output; returns the request, token cache and output.

    Args:
        arguments: The flags.
        least: Minimum of further ones.

    Raises:
        ConfigError: Some are wrong.
    """
    data = text_config(arguments)
    if mistakes := check_mixture(arguments, data, **least):
        raise ConfigError(mistakes)
    from recipes.models.export.output_folder import refuse_existing
    from recipes.upcycling.reduce.text_look import TextRequest

    out = Path(arguments.out).expanduser()
    refuse_existing(out, "--out")
    model = Path(arguments.model).expanduser()
    cache = Path(os.environ.get("GRAFT_CACHE", "~/.cache/graft")).expanduser() / "tokens"
    return TextRequest(model, data, arguments.samples, arguments.trust_remote_code), cache, out
