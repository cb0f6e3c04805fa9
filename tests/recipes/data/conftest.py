"""One small tokenizer for all tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.data.bpe import train_byte_level_bpe

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "def f(x):\n    return x + 1\n",
    "caf\u00e9 \u4f60\u597d",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 entries, ``<|endoftext|>`` being id 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_byte_level_bpe(TEXTS, 300, folder) == 300
    return folder
