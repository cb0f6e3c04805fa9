"""Trains a byte-level BPE tokenizer, for models that are trained from scratch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import DataError
from recipes.data.indexed import disk_errors
from recipes.runtime.atomic import rename_file, sync_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
"""Byte-level BPE begins with one token for each byte, so that it can spell any text."""


def train_byte_level_bpe(
    documents: Iterable[str], vocab_size: int, out_dir: str | Path, model_max_length: int = 131072
) -> int:
    """Trains on documents and saves an ordinary Hugging Face tokenizer folder, deterministically.

    GPT-2's recipe (Radford et al. 2019, section 2.2): BPE over bytes, merges never crossing its word pattern.

    Args:
        documents: The texts, streamed.
        vocab_size: Entries in all: the end token, 256 bytes, the rest merges.
        out_dir: The folder to write; files of an earlier tokenizer there are replaced.
        model_max_length: Longest text in tokens that the tokenizer says its model takes.

    Returns:
        The entries trained; fewer than asked for when the documents have too few pairs to merge.

    Raises:
        DataError: The vocabulary is too small for the bytes and the end token.
        DiskError: The folder cannot be written.
    """
    if vocab_size <= BYTES:
        rule = f"leaves no room for {BYTES} bytes and the end token"
        raise DataError.one("vocab_size", vocab_size, rule, f"Give {BYTES + 1} or more, such as 2048.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    _save(wrapped, Path(out_dir).expanduser())
    return tokenizer.get_vocab_size()


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves to a temporary folder and renames the files into place, ``tokenizer.json`` last."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            tokenizer.save_pretrained(temporary)
            for path in sorted(
                Path(temporary).iterdir(), key=lambda path: (path.name == "tokenizer.json", path.name)
            ):
                with path.open("rb") as stream:
                    sync_file(stream)
                rename_file(path, folder / path.name)
