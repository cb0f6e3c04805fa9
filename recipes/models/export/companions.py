"""Files that accompany a checkpoint's weights and config: found, checked, copied.

A link that leaves the folder is not followed: what it shows would be published with the model.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe.errors import DataError, Mistake, ModelError
from recipes.data.tokenizer import encode_texts, load_tokenizer
from recipes.data.tokenizer_code import code_fault, drop_code_name, files_of_code, runs_code
from recipes.runtime.user_json import LARGEST_FILE

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "tekken.json",
)

_BESIDE = "Keep all that the code reads beside it, in files and not in folders."
_SAMPLE = "Hello, World! The 3 quick foxes\n\n\tdef f(x): return x ** 2  # na\u00efve caf\u00e9 \u4f60\u597d"
_MEND = "Put the file that the checkpoint was published with into the folder, or delete it."


def check_companions(
    path: str, option: str = "dense", *, code: bool = False, trust_remote_code: bool = False
) -> list[Mistake]:
    """Finds the files of a folder that an export would copy and must not, and a tokenizer it could not carry.

    Args:
        path: The folder.
        option: Config path or flag that names it.
        code: Whether the model's code is copied too.
        trust_remote_code: Whether the tokenizer's code is trusted, and copied.
    """
    folder = Path(path).expanduser()
    if fault := code_fault(folder, trust_remote_code):
        return [Mistake(option, path, *fault)]
    return [
        Mistake(option, path, f"its {file.name} {rule}", _MEND)
        for file in _found(folder, code, trust_remote_code)
        if (rule := _refused(folder, file)) is not None
    ]


def copy_companions(
    source: Path, folder: Path, *, code: bool = False, trust_remote_code: bool = False
) -> None:
    """Copies the tokenizer and other files that accompany a checkpoint.

    Args:
        source: The checkpoint.
        folder: Where to.
        code: Whether to copy the model's code too, which somebody has trusted.
        trust_remote_code: Whether the tokenizer's code is trusted, and copied. The name of code that is not
            copied is left out of the tokenizer's settings.

    Raises:
        ModelError: One of them is a link that leaves the folder.
    """
    for file in _found(source, code, trust_remote_code):
        if (rule := _refused(source, file)) is not None:
            raise ModelError.one("dense", str(file), f"it {rule}", _MEND)
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not runs_code(source, trust_remote_code):
        drop_code_name(folder)


def check_carried_tokenizer(path: str, option: str = "dense", *, trust_remote_code: bool) -> list[Mistake]:
    """Checks that a tokenizer with code of its own gives the same ids from the files that an export carries.

    Args:
        path: The checkpoint.
        option: Config path or flag that names it.
        trust_remote_code: Whether that code may run.
    """
    source = Path(path).expanduser()
    if not runs_code(source, trust_remote_code):
        return []
    encode = partial(_sample_ids, trust_remote_code=trust_remote_code)
    try:
        expected = encode(source)
    except DataError as error:
        return [replace(mistake, path=option, value=path) for mistake in error.mistakes]
    with tempfile.TemporaryDirectory(prefix="graft-tokenizer-") as name:
        copy_companions(source, Path(name), trust_remote_code=trust_remote_code)
        shutil.copyfile(source / "config.json", Path(name) / "config.json")
        try:
            carried = encode(Path(name))
        except DataError as error:
            rule = f"its tokenizer does not work with what an export carries ({error.mistakes[0].rule})"
            return [Mistake(option, path, rule, _BESIDE)]
    rule = "its tokenizer's code gives other ids in another folder, so that an export would not have its ids"
    return [] if carried == expected else [Mistake(option, path, rule, _BESIDE)]


def _sample_ids(folder: Path, *, trust_remote_code: bool) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust_remote_code)
    return encode_texts(tokenizer, [_SAMPLE], special_tokens=True)


def _found(folder: Path, code: bool, trust_remote_code: bool) -> Iterator[Path]:
    # transformers looks for code beside config.json, and for what that code imports.
    patterns = (*_PATTERNS, *(["*.py"] if code else []))
    named = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    of_code = files_of_code(folder) if runs_code(folder, trust_remote_code) else []
    yield from dict.fromkeys([*named, *of_code])


def _refused(folder: Path, file: Path) -> str | None:
    """Returns why a file must not be copied; None where it may be."""
    try:
        found = file.stat()
    except OSError:
        return "is a link to nothing"
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size > LARGEST_FILE:
        return f"holds {found.st_size} bytes, far more than such a file has"
    home = folder.resolve()
    # The hub's cache keeps a snapshot's files beside it, under models--NAME/blobs.
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    target = file.resolve()
    if any(target.is_relative_to(place) for place in allowed):
        return None
    return f"is a link out of the folder, to {target}"
