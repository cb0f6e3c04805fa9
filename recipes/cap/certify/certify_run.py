"""Certifies the export of a run when the run has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moe.errors import ConfigError, Mistake, choose
from recipes.cap.certify import consumer_classes
from recipes.cap.certify.base import Consumer, Places
from recipes.config.schema import RunConfig
from recipes.config.sections.certify_config import CertifyConfig

# A flag of `graft certify`, and the option that says the same.
_OPTIONS = {
    "--in": "certify.programs",
    "--vllm": "certify.vllm",
    "--llama-cpp-bin": "certify.llama_cpp_bin",
    "--llama-cpp": "certify.llama_cpp",
}
_SEQUENCES, _LONGEST, _NEW_TOKENS = 4, 256, 24


def choose_consumers(
    names: Sequence[str], places: Places, log: Callable[[str], None]
) -> tuple[list[Consumer], list[Mistake]]:
    """Returns the programs of these names, and the mistakes that keep them from running."""
    kinds = consumer_classes()
    unknown = sorted(set(names) - set(kinds))
    mistakes = [Mistake("--in", name, "there is no such program", choose(name, kinds)) for name in unknown]
    consumers = [kinds[name](places, log) for name in dict.fromkeys(names) if name in kinds]
    return consumers, mistakes + [wrong for one in consumers if (wrong := one.check()) is not None]


def certifier(config: RunConfig) -> Callable[[Path], None]:
    """Returns what certifies the export of a run, given the run's directory.

    Raises:
        ConfigError: A program is not known, or not there.
    """
    asked = config.section(CertifyConfig)
    named = [asked.vllm, asked.llama_cpp, asked.llama_cpp_bin]
    places = Places(
        *(None if name is None else Path(name).expanduser() for name in named),
        asked.time_limit_s,
        config.trust_remote_code,
    )
    consumers, mistakes = choose_consumers(asked.programs, places, _say)
    if mistakes:
        raise ConfigError([_of_option(mistake) for mistake in mistakes])
    length = min(config.data.seq_len, _LONGEST)
    return lambda run: _certify(run, consumers, length, config.trust_remote_code)


def _of_option(mistake: Mistake) -> Mistake:
    """Returns a mistake of a flag as one of the option."""
    remedy = mistake.remedy
    for flag, option in _OPTIONS.items():
        remedy = remedy.replace(f"{flag} ", f"{option}=")
    return replace(mistake, path=_OPTIONS[mistake.path], remedy=remedy)


def _certify(run: Path, consumers: Sequence[Consumer], length: int, trust: bool) -> None:
    from recipes.cap.certify.certify_export import certify_export

    try:
        certify_export(
            run,
            consumers,
            text=None,
            sequences=_SEQUENCES,
            length=length,
            new_tokens=min(_NEW_TOKENS, length // 2),
            log=_say,
            trust_remote_code=trust,
        )
    except Exception as error:  # whatever it is, the run has ended well, and its results are written
        _say(f"FAILED, {error}. The run and its results are as they were; try again with graft certify {run}")


def _say(line: str) -> None:
    print(f"certify: {line}", flush=True)
