"""Content hash of token files."""

from __future__ import annotations

import hashlib

import numpy as np

from recipes.data.indexed import IndexedDataset, idx_path

SAMPLED_BLOCKS = 64
SAMPLED_TOKENS = 4096
"""Number and length of the evenly spaced blocks of tokens that are hashed."""


def content_hash(indexed: IndexedDataset) -> str:
    """Computes a hex sha256 of the index and of sampled tokens, which copies of the files share."""
    total = hashlib.sha256()
    with idx_path(indexed.prefix).open("rb") as stream:
        while block := stream.read(1 << 24):
            total.update(block)
    last = max(indexed.num_tokens - SAMPLED_TOKENS, 0)
    for start in np.unique(np.linspace(0, last, SAMPLED_BLOCKS).astype(np.int64)).tolist():
        total.update(indexed.tokens(start, min(start + SAMPLED_TOKENS, indexed.num_tokens)).tobytes())
    return total.hexdigest()
