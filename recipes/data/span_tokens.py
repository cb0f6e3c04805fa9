"""Tokenises a text and tells which tokens lie in spans of it, also where the tokenizer tells no offsets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from recipes.data.reply_spans import Span, SpanError
from recipes.data.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that hold the last letter of a text, which may be several bytes.
_LOOKED_AT = 8


def mark_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Iterable[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a text, and marks the tokens that begin in a span or reach into it.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        spans: Beginning and end of each, in characters.

    Returns:
        ``[n]`` int64 ids and ``[n]`` bool.

    Raises:
        SpanError: The tokenizer tells no offsets, and a token crosses the end of a span.
        DataError: The tokenizer fails on the text.
    """
    if not tokenizer.is_fast:
        return _mark_by_prefixes(tokenizer, text, spans)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    own = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        own |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return np.array(encoded["input_ids"], dtype=np.int64), own


def _mark_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Iterable[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """Marks spans by the number of tokens of the text up to their ends.

    These must be the first tokens of the whole text, and end as the text does there, or no number is certain.
    """
    (ids,) = encode_texts(tokenizer, [text], special_tokens=False)
    own = np.zeros(len(ids), dtype=np.bool_)

    def tokens_before(place: int) -> int:
        (before,) = encode_texts(tokenizer, [text[:place]], special_tokens=False)
        end = tokenizer.decode(
            before[-_LOOKED_AT:], clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )
        # Some leave out spaces at the end of a text, which are tokens within one.
        if before != ids[: len(before)] or not end.endswith(text[:place][-1:]):
            raise SpanError(
                f"no token ends with {text[:place][-20:]!r}, where a reply begins or ends, that spells it; a "
                "tokenizer in Python does not tell where tokens lie"
            )
        return len(before)

    for start, end in spans:
        own[tokens_before(start) : tokens_before(end)] = True
    return np.array(ids, dtype=np.int64), own
