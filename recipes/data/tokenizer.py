"""Finds, checks, loads and fingerprints the tokenizer of a checkpoint folder."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import DataError, Mistake
from recipes.data.tokenizer_code import SETTINGS_FILE, code_fault, files_of_code, runs_code, unknown_class
from recipes.runtime.code_folder import private_code_folder
from recipes.runtime.machine_memory import address_space_left, require_address_space
from recipes.runtime.user_json import LARGEST_FILE, UserJsonError, read_json_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files any of which makes a folder a tokenizer's."""

SETTINGS = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
SETTING_FILES = (*SETTINGS, "merges.txt")
"""Files that change ids as well, so that they are part of the fingerprint."""

_AGAIN = "Fetch or save the tokenizer's files again."
_MEND = "Mend its code, or use a tokenizer.json."
# Bytes that a tokenizer takes for its work, times the size of its file, and for each character of a text.
_ROOM, _TIMES_FILE, _PER_CHARACTER = 1 << 24, 20, 256


def check_tokenizer(
    tokenizer_dir: str | Path,
    vocab_size: int | None = None,
    where: str = "tokenizer",
    *,
    trust_remote_code: bool = False,
) -> list[Mistake]:
    """Checks that there is a tokenizer that fits a model; fast if there is a ``tokenizer.json``.

    Added tokens beyond the vocabulary are allowed, since some published models have such that text never
    yields (Gemma's image token); the ids of documents are checked once they are tokenised.

    Args:
        tokenizer_dir: A local folder.
        vocab_size: Rows of the model's embedding; None skips the comparison.
        where: The config path or flag named in mistakes.
        trust_remote_code: Whether the tokenizer may run code of its own.
    """
    mistakes = _check_files(tokenizer_dir, vocab_size, where, trust_remote_code)
    if mistakes:
        return mistakes
    try:
        _load(tokenizer_dir, where, trust_remote_code)
    except DataError as error:
        return list(error.mistakes)
    return []


def _check_files(
    tokenizer_dir: str | Path, vocab_size: int | None, where: str, trust_remote_code: bool
) -> list[Mistake]:
    folder, given = Path(tokenizer_dir).expanduser(), str(tokenizer_dir)
    if not folder.is_dir():
        return [Mistake(where, given, "is not a folder", "Name a folder with a tokenizer in it.")]
    if mistake := _check_settings(folder, where):
        return [mistake]
    if fault := code_fault(folder, trust_remote_code):
        return [Mistake(where, given, *fault)]
    runs = runs_code(folder, trust_remote_code)
    if not runs and not any((folder / name).is_file() for name in MODEL_FILES):
        remedy = "Copy its files there (tokenizer.json, tokenizer_config.json), or name another folder."
        return [Mistake(where, given, "holds no tokenizer", remedy)]
    if runs:
        private_code_folder()
    try:
        largest = _largest_base_id(folder, runs)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        return [
            Mistake(where, given, f"holds a tokenizer that cannot be read ({_why(error, folder)})", _AGAIN)
        ]
    if vocab_size is not None and largest >= vocab_size:
        rule = f"does not fit: its largest id is {largest}, the model's vocabulary has {vocab_size} entries"
        return [Mistake(where, given, rule, "Use the tokenizer that the model was trained with.")]
    return []


def _check_settings(folder: Path, where: str) -> Mistake | None:
    """Checks what a folder's files are and that its settings are JSON, before any library reads them."""
    odd = [path for name in MODEL_FILES if (path := folder / name).exists() and not path.is_file()]
    if odd:
        return Mistake(where, str(odd[0]), "is no regular file", "Fetch the tokenizer's files again.")
    read = (*MODEL_FILES, *SETTING_FILES, "chat_template.jinja")
    large = [path for name in read if _size(path := folder / name) > LARGEST_FILE]
    if large:
        rule = f"holds {_size(large[0])} bytes, far more than such a file has"
        return Mistake(where, str(large[0]), rule, "Fetch the tokenizer's files again.")
    for name in SETTINGS:
        try:
            settings = read_json_file(folder / name) if (folder / name).exists() else {}
            clause = None if isinstance(settings, dict) else "holds no JSON object"
        except UserJsonError as error:
            clause = error.clause
        if clause is not None:
            return Mistake(where, str(folder / name), clause, _AGAIN)
    return None


def load_tokenizer(
    tokenizer_dir: str | Path, append_eos: bool, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder with transformers; downloads nothing.

    Args:
        tokenizer_dir: The folder.
        append_eos: Whether documents will be closed by its end-of-sequence token.
        trust_remote_code: Whether it may run code of its own.

    Raises:
        DataError: There is none, it needs code that is not trusted, or it has no end-of-sequence token
            although one is to be appended.
    """
    mistakes = _check_files(tokenizer_dir, None, "tokenizer", trust_remote_code)
    folder = Path(tokenizer_dir).expanduser()
    if mistakes:
        raise DataError(mistakes)
    if address_space_left() is not None:
        # A thread of its own for every core takes address space: much more than the work itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sizes = [path.stat().st_size for name in MODEL_FILES if (path := folder / name).is_file()]
    require_address_space(_ROOM + _TIMES_FILE * max(sizes, default=0), f"the tokenizer in {folder}")
    tokenizer = _load(tokenizer_dir, "tokenizer", trust_remote_code)
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError.one(
            "tokenizer",
            str(tokenizer_dir),
            "has no end-of-sequence token",
            "Set eos_token in its tokenizer_config.json, or data.append_eos=false (--no-eos).",
        )
    return tokenizer


def require_room(characters: int) -> None:
    """Checks that a tokenizer gets the memory for a text: where it does not, it ends the process.

    Raises:
        LimitError: A limit on this process leaves less.
    """
    require_address_space(_ROOM + _PER_CHARACTER * characters, f"tokenising {characters} characters")


def first_tokens(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | Literal["auto"]) -> list[int]:
    """Returns the tokens to begin each document with.

    Args:
        tokenizer: The tokenizer.
        prepend_bos: True for its beginning-of-sequence token, False for none, ``auto`` for what the tokenizer
            puts before a text by itself.

    Raises:
        DataError: It has no such token although one is asked for.
    """
    if prepend_bos == "auto":
        whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        before = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        return list(whole[: before[0]]) if before else []
    if prepend_bos and tokenizer.bos_token_id is None:
        rule = "the tokenizer has no beginning-of-sequence token"
        raise DataError.one("data.prepend_bos", True, rule, "Set it to auto or false.")
    return [tokenizer.bos_token_id] if prepend_bos else []


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns one more than the largest id of a tokenizer, including added tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool
) -> list[list[int]]:
    """Returns the ids of each text.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        special_tokens: Whether it puts before and behind each what it puts around texts by itself.

    Raises:
        DataError: It fails on one, or gives what is no id of its vocabulary, as code of its own may.
    """
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        # Classes of transformers give ids of their vocabulary; to look at each would take long.
        if type(tokenizer).__module__.startswith("transformers."):
            return list(encoded)
        lists = [[operator.index(token) for token in ids] for ids in encoded]
        low, high = (pick(map(pick, filter(None, lists)), default=0) for pick in (min, max))
        size = vocab_size_of(tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # whatever its code raises
        rule = f"the tokenizer fails on a text ({' '.join(str(error).split())[:300] or type(error).__name__})"
        raise DataError.one("tokenizer", tokenizer.name_or_path, rule, _MEND) from error
    if low < 0 or high >= size:
        rule = f"the tokenizer gives ids from {low} to {high}, and its vocabulary has {size} entries"
        raise DataError.one("tokenizer", tokenizer.name_or_path, rule, _MEND)
    return lists


def spelled(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], **options: Any) -> str:
    """Returns the text of ids that a model has chosen, without those of rows that only fill its embedding.

    Tokenizers in Rust leave those out; one in Python may fail on them.
    """
    size = vocab_size_of(tokenizer)
    return str(tokenizer.decode([token for token in ids if token < size], **options))


def tokenizer_files(tokenizer_dir: str | Path, *, trust_remote_code: bool = False) -> list[Path]:
    """Lists the files that decide ids: with code that runs, all that the code may read."""
    folder = Path(tokenizer_dir).expanduser()
    if runs_code(folder, trust_remote_code):
        return files_of_code(folder)
    return [path for name in sorted((*MODEL_FILES, *SETTING_FILES)) if (path := folder / name).is_file()]


def tokenizer_fingerprint(tokenizer_dir: str | Path, *, trust_remote_code: bool = False) -> str:
    """Computes a hex sha256 of the contents of all files that decide ids, whatever the folder's path."""
    total = hashlib.sha256()
    for path in tokenizer_files(tokenizer_dir, trust_remote_code=trust_remote_code):
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


def _largest_base_id(folder: Path, runs: bool) -> int:
    """Returns the largest id of the vocabulary without added tokens."""
    if (folder / "tokenizer.json").is_file() and not runs:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Some vocabularies consist of added tokens only (a byte table in the model).
        vocabulary = tokenizer.get_vocab(with_added_tokens=False) or tokenizer.get_vocab()
        return max(vocabulary.values(), default=-1)
    return _auto_tokenizer(folder, runs).vocab_size - 1


def _load(tokenizer_dir: str | Path, where: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = Path(tokenizer_dir).expanduser()
    try:
        tokenizer = _auto_tokenizer(folder, runs_code(folder, trust_remote_code))
        tokenizer("a")  # some settings are looked at only when it is used
        return tokenizer
    except Exception as error:  # whatever transformers makes of settings that it does not understand
        rule = f"holds a tokenizer that transformers cannot load ({_why(error, folder)})"
        raise DataError.one(where, str(tokenizer_dir), rule, "Fetch or save its files again.") from error


def _why(error: Exception, folder: Path) -> str:
    if name := unknown_class(folder):
        return (
            f"its class is {name}, which transformers does not have, and it names no code of it by auto_map"
        )
    return " ".join(str(error).split())[:300] or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _auto_tokenizer(folder: Path, runs: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=runs)
    except SystemExit as error:  # a run that its code ended would count as done
        raise RuntimeError("its code ends the process") from error
