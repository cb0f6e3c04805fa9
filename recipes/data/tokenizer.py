"""The tokenizer of a checkpoint folder: found, checked against the model, loaded, fingerprinted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import DataError, Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Any of these makes a folder that of a tokenizer."""

SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
"""These change ids too, so they count in the fingerprint."""


def check_tokenizer(
    tokenizer_dir: str | Path, vocab_size: int | None = None, where: str = "tokenizer"
) -> list[Mistake]:
    """Whether a tokenizer is there and fits a model; fast where there is a ``tokenizer.json``.

    Added tokens beyond the vocabulary are allowed here, since models are published with some that text never
    gives (Gemma's image token): the ids that documents really give are checked when they have been tokenised.

    Args:
        tokenizer_dir: A local folder.
        vocab_size: Rows of the model's embedding; None does not compare.
        where: The config path or flag that mistakes carry.
    """
    folder = Path(tokenizer_dir).expanduser()
    if not folder.is_dir():
        return [
            Mistake(where, str(tokenizer_dir), "is not a folder", "Name a folder with a tokenizer in it.")
        ]
    if not any((folder / name).is_file() for name in MODEL_FILES):
        remedy = "Copy its files there (tokenizer.json, tokenizer_config.json), or name another folder."
        return [Mistake(where, str(tokenizer_dir), "holds no tokenizer", remedy)]
    try:
        largest = _largest_base_id(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        remedy = "Fetch or save the tokenizer's files again."
        return [
            Mistake(where, str(tokenizer_dir), f"holds a tokenizer that cannot be read ({error})", remedy)
        ]
    if vocab_size is not None and largest >= vocab_size:
        rule = f"does not fit: its largest id is {largest}, the model's vocabulary has {vocab_size} entries"
        return [
            Mistake(where, str(tokenizer_dir), rule, "Use the tokenizer that the model was trained with.")
        ]
    return []


def load_tokenizer(tokenizer_dir: str | Path, append_eos: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder by transformers; nothing is downloaded, and no code there is run.

    Raises:
        DataError: There is none, or it has no end-of-sequence token although one is to be appended.
    """
    mistakes = check_tokenizer(tokenizer_dir)
    if mistakes:
        raise DataError(mistakes)
    tokenizer = _auto_tokenizer(Path(tokenizer_dir).expanduser())
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError.one(
            "tokenizer",
            str(tokenizer_dir),
            "has no end-of-sequence token",
            "Set eos_token in its tokenizer_config.json, or data.append_eos=false (--no-eos).",
        )
    return tokenizer


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id it can give, added tokens counted."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer_dir: str | Path) -> str:
    """A hex sha256 of the contents of every file that decides ids; the place of the folder does not count."""
    folder, total = Path(tokenizer_dir).expanduser(), hashlib.sha256()
    for name in sorted((*MODEL_FILES, *SETTING_FILES)):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            total.update(f"{name} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()


def _largest_base_id(folder: Path) -> int:
    """The largest id of the vocabulary proper."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Some vocabularies hold added tokens only (a byte table in the model): then these are what there is.
        vocabulary = tokenizer.get_vocab(with_added_tokens=False) or tokenizer.get_vocab()
        return max(vocabulary.values(), default=-1)
    return _auto_tokenizer(folder).vocab_size - 1


def _auto_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
