"""Reads the file of prompts, and reports its mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, Mistake
from recipes.config.schema import RunConfig
from recipes.config.sections.prompts_config import PromptsConfig

_OPTION = "prompts.path"
_KEYS = ("positive_prompts", "negative_prompts")


@dataclass(frozen=True)
class ExpertPrompts:
    """Prompts of one expert.

    Attributes:
        positive: Texts that are to go to it.
        negative: Texts that are not.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


def check_prompt_file(config: RunConfig) -> list[Mistake]:
    """Checks that the file has prompts for each expert, and that the method leaves rows to be set."""
    path, method = config.section(PromptsConfig).path, config.upcycle
    if path is None:
        return []
    mistakes = []
    try:
        count = len(read_prompts(path))
        if count != method.num_experts:
            rule = f"it has prompts for {count} experts, and there are {method.num_experts}"
            mistakes.append(Mistake(_OPTION, path, rule, f"Set upcycle.num_experts={count}."))
    except ConfigError as error:
        mistakes += error.mistakes
    if method.starts_router:
        rule = f"upcycle={method.name} sets the router's rows itself"
        mistakes.append(Mistake(_OPTION, path, rule, "Leave it at null, or choose another method."))
    return mistakes


def read_prompts(path: str) -> list[ExpertPrompts]:
    """Reads the prompts of all experts, in their order.

    Raises:
        ConfigError: The file cannot be read or has another form; all mistakes at once.
    """
    entries = _entries(path)
    mistakes = [mistake for number, entry in enumerate(entries) for mistake in _wrong(number, entry)]
    found = [
        ExpertPrompts(*(tuple(entry.get(key) or ()) for key in _KEYS)) for entry in entries if not mistakes
    ]
    seen: dict[ExpertPrompts, int] = {}
    for number, prompts in enumerate(found):
        if prompts in seen:
            rule = f"experts {seen[prompts]} and {number} have the same prompts, and would tie"
            mistakes.append(Mistake(_OPTION, path, rule, "Give each its own."))
        seen.setdefault(prompts, number)
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _entries(path: str) -> list[Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"it cannot be read ({error.strerror})"
        raise ConfigError.one(_OPTION, path, rule, "Name a YAML or JSON file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        rule = f"it is neither YAML nor JSON ({str(error).splitlines()[0]})"
        raise ConfigError.one(_OPTION, path, rule, "Correct it.") from error
    entries = content.get("experts") if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries:
        remedy = "Write a list with an entry for each expert: - positive_prompts: [...]."
        raise ConfigError.one(_OPTION, path, "it holds no list of experts", remedy)
    return entries


def _wrong(number: int, entry: Any) -> list[Mistake]:
    place = f"{_OPTION}[{number}]"
    if not isinstance(entry, Mapping):
        return [Mistake(place, entry, "it is no entry with keys", "Write positive_prompts: [...].")]
    mistakes = []
    for key in _KEYS:
        texts = entry.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            rule = "it is no list of texts that are not empty"
            mistakes.append(Mistake(f"{place}.{key}", texts, rule, "Write [text, text]."))
    if not entry.get(_KEYS[0]):
        rule = "an expert without prompts has no row"
        mistakes.append(Mistake(f"{place}.{_KEYS[0]}", None, rule, "Give it at least one text."))
    return mistakes
