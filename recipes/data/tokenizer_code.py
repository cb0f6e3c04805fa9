"""Tokenizers with code of their own: whether it runs, and which files decide ids then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.user_json import UserJsonError, read_json_file

SETTINGS_FILE = "tokenizer_config.json"
# What Graft itself writes into a folder.
_RECORDS = ("certificate.json", "graft_upcycle.json", "ders.json", "moe_config.json")
# Files beside a tokenizer with code of its own that the code does not read: weights, and what people read.
_NO_FILES_OF_CODE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md", ".index.json")
_NO_NAMES_OF_CODE = ("config.json", "generation_config.json", "LICENSE", *_RECORDS)


def runs_code(folder: Path, trust_remote_code: bool) -> bool:
    """Tells whether a tokenizer runs code of its folder: it names some that is there and trusted."""
    reference = _reference(_settings(folder))
    return trust_remote_code and isinstance(reference, str) and _file(folder, reference) is not None


def names_code(folder: Path) -> bool:
    """Tells whether a tokenizer names code of its own, there or not."""
    return "AutoTokenizer" in _auto_map(_settings(folder))


def code_fault(folder: Path, trust_remote_code: bool) -> tuple[str, str] | None:
    """Returns why a tokenizer cannot be used for want of its code, as rule and remedy; None where it can.

    One whose class transformers has itself needs none.

    Args:
        folder: A local folder.
        trust_remote_code: Whether the user trusts the code.
    """
    settings = _settings(folder)
    if not names_code(folder) or runs_code(folder, trust_remote_code):
        return None
    if _in_transformers(settings.get("tokenizer_class")):
        return None
    reference, where = _reference(settings), f"auto_map in {SETTINGS_FILE}"
    if not isinstance(reference, str):
        rule = f"holds a tokenizer whose {where} names no class as [SLOW, FAST]"
        return rule, "Fetch its files again."
    repository, apart, own = reference.rpartition("--")
    module = own.partition(".")[0]
    if apart:
        rule = (
            f"holds a tokenizer whose code lies in the repository {repository} ({where}), and none is fetched"
        )
        return rule, f"Put its {module}.py into the folder, and delete {repository}-- from auto_map."
    if _file(folder, reference) is None:
        rule = f"holds a tokenizer with code of its own ({where}), and its {module}.py is not there"
        return rule, "Fetch all of its files."
    rule = f"holds a tokenizer with code of its own ({where})"
    remedy = "If you have read and trust that code, set trust_remote_code=true (tools: --trust-remote-code)."
    return rule, remedy


def unknown_class(folder: Path) -> str | None:
    """Returns the class of a tokenizer that neither transformers nor code that it names has."""
    name = _settings(folder).get("tokenizer_class")
    return None if names_code(folder) or not isinstance(name, str) or _in_transformers(name) else name


def files_of_code(folder: Path) -> list[Path]:
    """Lists the files that the code of a tokenizer may read: all of its folder but weights and documents."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.is_dir()
        and not path.name.startswith(".")
        and not path.name.endswith(_NO_FILES_OF_CODE)
        and path.name not in _NO_NAMES_OF_CODE
    )


def drop_code_name(folder: Path) -> None:
    """Deletes the name of code that is not there from a tokenizer's settings."""
    settings = _settings(folder)
    if settings.pop("auto_map", None) is not None:
        atomic_write_json(folder / SETTINGS_FILE, settings)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_json_file(folder / SETTINGS_FILE)
    except UserJsonError:
        return {}  # reported by the check of the tokenizer, if the file is there
    return settings if isinstance(settings, dict) else {}


def _auto_map(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    given = settings.get("auto_map")
    if isinstance(given, list):  # as transformers wrote it once
        return {"AutoTokenizer": given}
    return given if isinstance(given, Mapping) else {}


def _reference(settings: Mapping[str, Any]) -> str | None:
    """Returns the class that transformers takes, as ``MODULE.CLASS``: the fast one where there is one."""
    pair = _auto_map(settings).get("AutoTokenizer")
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    found = pair[0] if pair[1] is None else pair[1]
    own = found.rpartition("--")[2] if isinstance(found, str) else ""
    return found if own.count(".") == 1 else None


def _file(folder: Path, reference: str) -> Path | None:
    module, _, _ = reference.partition(".")
    path = folder / f"{module}.py"
    return path if "--" not in reference and path.is_file() else None


def _in_transformers(name: object) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str) or not name:
        return False
    plain = name.removesuffix("Fast")
    found = (tokenizer_class_from_name(each) for each in (name, plain, f"{plain}Fast"))
    return any(each is not None and each.__module__.startswith("transformers.") for each in found)
