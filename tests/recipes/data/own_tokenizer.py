"""A tokenizer in Python that a checkpoint brings with it: a letter is a token, and so is a doubled one."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

LETTERS = ["<unk>", "<end>", *string.printable, *(2 * letter for letter in string.ascii_lowercase)]
"""The vocabulary; its file is one that no other tokenizer has."""

_CODE = """
import json
from pathlib import Path
from transformers import PreTrainedTokenizer
from .pieces import pieces

Path({marker!r}).touch()

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "letters.own"}}

    def __init__(self, vocab_file, **options):
        self.letters = json.loads(Path(vocab_file).read_text())
        self.places = {{letter: place for place, letter in enumerate(self.letters)}}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return dict(self.places) | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return pieces(text)

    def _convert_token_to_id(self, token):
        return self.places.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "letters.own"
        path.write_text(json.dumps(self.letters))
        return (str(path),)
"""
_PIECES = """
import re

def pieces(text):
    return [match.group() for match in re.finditer(r"([a-z])\\1|.", text, re.DOTALL)]
"""


def own_ids(text: str) -> list[int]:
    """The ids of a text, worked out here."""
    ids, at = [], 0
    while at < len(text):
        double = text[at : at + 2]
        piece = double if double in LETTERS and len(double) == 2 else text[at]
        ids.append(LETTERS.index(piece) if piece in LETTERS else 0)
        at += len(piece)
    return ids


def give_own_tokenizer(folder: Path, marker: Path, **settings: object) -> Path:
    """Replaces a folder's tokenizer by one with code of its own, which makes the marker when it runs."""
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens_map.json")):
        path.unlink()
    (folder / "tokenization_own.py").write_text(_CODE.format(marker=str(marker)))
    (folder / "pieces.py").write_text(_PIECES)
    (folder / "letters.own").write_text(json.dumps(LETTERS))
    named: dict[str, object] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    content = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": named,
        "eos_token": "<end>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | settings))
    return folder


def own_checkpoint(plain: Path, folder: Path, marker: Path) -> Path:
    """A copy of a checkpoint with such a tokenizer."""
    return give_own_tokenizer(Path(shutil.copytree(plain, folder)), marker)
