"""The files that hold a checkpoint's weights, by transformers' rule, and what their headers say.

transformers reads the file that config.json names, else ``model.safetensors``, else the files of
``model.safetensors.index.json``, and nothing else: not other files that lie beside them, such as
``consolidated.safetensors``, averages, adapters, or a second model.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe.errors import Mistake
from recipes.runtime.user_json import UserJsonError, read_json_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_INDEX_ENDING = ".safetensors.index.json"
# Endings of the tensors that quantised weights are stored with.
_PACKED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..*|weight_scale(_inv)?|SCB|"
    r"weight_packed|weight_zero_point|weight_shape|input_scale|nested_absmax|nested_quant_map|W_q|codes|codebooks|\w+_blocks|\w+_scales)"
)
_AGAIN = "Download the checkpoint again."


class FolderError(ValueError):
    """A folder whose weights cannot be found; the message is a clause about it.

    Attributes:
        remedy: What the user can do, as a sentence.
    """

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.remedy = remedy


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that hold the weights.

    Raises:
        FolderError: There are none, the index cannot be read, or it names a file outside the folder.
    """
    named = _named_by_config(folder)
    if named is None:
        named = SINGLE_NAME if (folder / SINGLE_NAME).is_file() else INDEX_NAME
    if not named.endswith(_INDEX_ENDING):
        return [folder / named]
    if not (folder / named).exists():
        raise _no_weights(folder)
    return [folder / name for name in _listed(folder, named)]


def _named_by_config(folder: Path) -> str | None:
    try:
        config = read_json_file(folder / "config.json")
    except UserJsonError:
        return None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is None:
        return None
    _check_name("transformers_weights of config.json", named)
    if not named.endswith((".safetensors", _INDEX_ENDING)):
        rule = f"transformers_weights of config.json names {named!r}, which is no safetensors file"
        raise FolderError(rule, _AGAIN)
    return str(named)


def _listed(folder: Path, index: str) -> list[str]:
    try:
        content: Any = read_json_file(folder / index)
    except UserJsonError as error:
        raise FolderError(f"{index} {error.clause}", _AGAIN) from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise FolderError(f"{index} has no weight_map", _AGAIN)
    names = {str(name) if isinstance(name, list | dict) else name for name in listed.values()}
    for name in names:
        _check_name(index, name)
    if not names:
        raise FolderError(f"{index} names no files", _AGAIN)
    return sorted(names)


def _check_name(where: str, name: object) -> None:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise FolderError(f"{where} names {name!r}, which is not a plain file name", _AGAIN)


def require_regular(path: Path) -> None:
    """Checks that a path is a regular file, or a link to one: a named pipe would never end.

    Raises:
        FolderError: It is something else.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise FolderError(f"{path.name} is no regular file", "Give a folder of files.")


def _no_weights(folder: Path) -> FolderError:
    require_regular(folder / SINGLE_NAME)
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).is_symlink():
            return FolderError(f"{name} is a link to nothing", "Download that file.")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        rule = (
            f"it has neither {SINGLE_NAME} nor {INDEX_NAME}, and transformers does not look for {others[0]}"
        )
        remedy = f"Rename the file of the weights to {SINGLE_NAME}, or fetch the index of its parts."
        return FolderError(rule, remedy)
    pickles = sorted(path.name for kind in ("*.bin", "*.pt*") for path in folder.glob(kind))
    found = f"there are {', '.join(pickles[:3])}, which are pickles" if pickles else "it holds no weights"
    return FolderError(f"no *.safetensors file: {found}", "Save it with safe_serialization=True.")


def check_weights(path: str, folder: Path, option: str = "dense") -> list[Mistake]:
    """Finds what is wrong with the files of the weights, from their headers.

    Args:
        path: The folder as the user gave it.
        folder: The folder.
        option: Config path or flag that names it.
    """
    try:
        files = weight_files(folder)
        for file in files:
            require_regular(file)
    except FolderError as error:
        return [Mistake(option, path, str(error), error.remedy)]
    mistakes: list[Mistake] = []
    names: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                own = list(opened.keys())
        except FileNotFoundError:
            rule = f"{file.name}, named in {INDEX_NAME}, is missing"
            mistakes.append(Mistake(option, path, rule, "Download it."))
            continue
        except (SafetensorError, OSError) as error:
            rule = f"{file.name} is corrupt or cut short ({error})"
            mistakes.append(Mistake(option, path, rule, "Download that file again."))
            continue
        twice = next((name for name in own if name in names), None)
        if twice is not None:
            rule = f"{names[twice]} and {file.name} both hold {twice}"
            mistakes.append(Mistake(option, path, rule, "Leave one of them, and its index."))
        names |= dict.fromkeys(own, file.name)
    return mistakes or _check_packed(option, path, list(names))


def packed_names(names: Iterable[str]) -> list[str]:
    """Returns the names, sorted, that tensors of quantised weights have."""
    return sorted(name for name in names if _PACKED.fullmatch(name))


def _check_packed(option: str, path: str, names: list[str]) -> list[Mistake]:
    packed = packed_names(names)
    if not packed:
        return []
    rule = f"its weights are quantised (its files hold {packed[0]})"
    return [Mistake(option, path, rule, "Give the checkpoint that it was quantised from.")]
