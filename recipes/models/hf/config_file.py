"""Reads ``config.json`` of a checkpoint folder: as it stands, and as transformers takes it.

Whatever a library raises over a user's file becomes one sentence here, and nothing is fetched or run that
the user has not trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import GraftError, ModelError
from recipes.runtime.code_folder import private_code_folder
from recipes.runtime.user_json import UserJsonError, read_json_file

_AGAIN = "Download it again."
_GIVE = "Give the config.json that the model was published with."
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_FLOATS = ("NaN", "Infinity", "-Infinity")
_WINDOW_KEYS = ("window", "attention_chunk_size", "local_attention")
# Keys by which transformers fetches or runs code of others, at any depth: a name with a slash is a
# repository of the hub.
_CODE_KEYS = ("attn_implementation", "experts_implementation", "kernel")


@contextmanager
def library_reads(option: str, path: object, remedy: str, what: str = "read it") -> Iterator[None]:
    """Turns whatever a library raises over a user's file into one sentence about the file.

    Args:
        option: Config path or flag that names the file.
        path: The file or folder.
        remedy: What the user can do.
        what: What transformers could not do.

    Raises:
        ModelError: The library has raised something.
    """
    try:
        yield
    except (GraftError, MemoryError):
        raise
    except Exception as error:  # each library and version raises others
        rule = f"transformers cannot {what} ({first_line(error)})"
        raise ModelError.one(option, str(path), rule, remedy) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text that says something, shortened, or its type."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = ": ".join([line for line in lines if line][:2]) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def read_config(folder: Path, option: str = "dense") -> dict[str, Any]:
    """Reads the folder's ``config.json``.

    Args:
        folder: The checkpoint.
        option: Config path or flag that names it.

    Raises:
        ModelError: There is none, it is no regular file, or it holds no JSON object.
    """
    path = folder / "config.json"
    try:
        content = read_json_file(path)
    except UserJsonError as error:
        rule, remedy = f"its config.json {error.clause}", _AGAIN
        if not path.exists():
            rule, remedy = "there is no config.json in it", "Give a checkpoint in Hugging Face format."
        raise ModelError.one(option, str(folder), rule, remedy) from None
    if not isinstance(content, dict):
        raise ModelError.one(option, str(folder), "its config.json is not a JSON object", _AGAIN)
    return content


def code_keys(config: Mapping[str, Any]) -> list[str]:
    """Lists the keys, at any depth, whose values make transformers fetch and run code of a hub."""
    found: list[str] = []
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{place}.{key}" if place else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(place, inner) for inner in value]
        elif isinstance(value, str) and "/" in value and any(key in place for key in _CODE_KEYS):
            found.append(f"{place}={value}")
    return sorted(found)


def brings_code(config: Mapping[str, Any]) -> bool:
    """Tells whether a model needs code of its folder: transformers has no class for it.

    Many published folders name code (``auto_map``) that transformers has long had itself. An export in
    Graft's format names it in the dense model's config.
    """
    inner = config.get("dense_config")
    config = inner if isinstance(inner, Mapping) else config
    return "auto_map" in config and not _is_native(config)


def trusts(folder: Path, trust_remote_code: bool) -> bool:
    """Tells whether transformers is to run the code of a folder.

    It does so where the user trusts it and it is there; a folder of a family that transformers has, without
    the files of its code, is loaded by transformers' own class.
    """
    if not trust_remote_code:
        return False
    config = read_config(folder)
    runs = brings_code(config) or any(folder.glob("*.py"))
    if runs:
        private_code_folder()
    return runs


def load_config(folder: Path, *, trust_remote_code: bool = False, option: str = "dense") -> Any:
    """Reads the config as transformers takes it; of an export in Graft's format, that of its dense model.

    Args:
        folder: The checkpoint.
        trust_remote_code: Whether the folder may bring its own code.
        option: Config path or flag that names it.

    Raises:
        ModelError: transformers refuses it; the message begins with the field where it says so.
    """
    from transformers import AutoConfig

    content = read_config(folder, option)
    if isinstance(inner := content.get("dense_config"), dict):
        return inner_config(inner, folder, trust_remote_code=trust_remote_code)[0]
    trust = trusts(folder, trust_remote_code)
    with library_reads(option, folder, _GIVE, "use its config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    return config if trust else _without_code(config)


def inner_config(values: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> tuple[Any, bool]:
    """Makes the config of the dense model that an export in Graft's format holds.

    Args:
        values: The dense model's config.
        folder: The export; the code of a model that brings some lies in it.
        trust_remote_code: Whether that code may run.

    Returns:
        transformers' config, and whether the model is built by its own code.

    Raises:
        ModelError: It needs code that is not trusted, or transformers refuses it.
    """
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    runs_code = "auto_map" in values and (brings_code(values) or any(folder.glob("*.py")))
    if runs_code and not trust_remote_code:
        rule = "its model brings its own code (auto_map in config.json)"
        remedy = (
            "If you have read and trust that code, set trust_remote_code=True (tools: --trust-remote-code)."
        )
        raise ModelError.one("path", str(folder), rule, remedy)
    rest = with_floats({key: value for key, value in values.items() if key != "model_type"})
    with library_reads("path", folder, "Export the run again.", "use its config.json"):
        if runs_code:
            private_code_folder()
        named = values["auto_map"].get("AutoConfig") if runs_code else None
        if named is None:
            config = AutoConfig.for_model(values["model_type"], **rest)
        else:
            config = get_class_from_dynamic_module(named, str(folder), local_files_only=True)(**rest)
        config._name_or_path = str(folder)  # where transformers looks for the model's code
    return (config, True) if runs_code else (_without_code(config), False)


def with_floats(value: Any) -> Any:
    """Returns a value of JSON with all its floats; transformers writes some as ``{"__float__": "NaN"}``."""
    if isinstance(value, list):
        return [with_floats(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
        return float(value["__float__"])
    return {key: with_floats(inner) for key, inner in value.items()}


def _without_code(config: Any) -> Any:
    """Drops names of code that nobody has trusted: models built of the config would fetch and run it."""
    config._attn_implementation = config._experts_implementation = None
    vars(config).pop("auto_map", None)
    return config


def context_length(config: Mapping[str, Any]) -> int | None:
    """Returns the tokens that a model takes at most, where its config says so."""
    text = config.get("text_config") or config.get("dense_config") or config
    return next((text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None)


def longest_window(config: Mapping[str, Any]) -> int:
    """Returns the longest window of attention that a config names, read or not; 0 for none.

    Windows as long as the model's context are none: nothing is beyond them.
    """
    text = config.get("text_config") or config.get("dense_config") or config
    context = context_length(config)
    named = (value for key, value in text.items() if any(word in key for word in _WINDOW_KEYS))
    lengths = (v for value in named for v in (value if isinstance(value, list) else [value]))
    return max((v for v in lengths if type(v) is int and (context is None or v < context)), default=0)


def vocabulary_size(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Returns the number of rows of a checkpoint's embedding."""
    return int(load_config(folder, trust_remote_code=trust_remote_code).get_text_config().vocab_size)


def _is_native(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
