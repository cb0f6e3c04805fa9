"""Renders a conversation to token ids, and marks those that the assistant has written.

A template with ``{% generation %}`` blocks marks them itself. For others, the conversation is rendered up to
each reply: the text before the reply's content does not depend on it and is not the assistant's; the rest,
including the end of turn, is. The template must not change earlier turns when later ones are added, which is
checked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from moe.errors import DataError, Mistake
from recipes.data.config import DataConfig
from recipes.data.conversations import ASSISTANT, Conversation
from recipes.data.tokenizer import load_tokenizer
from recipes.runtime.atomic import atomic_write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Placeholder for the text of a reply.
_ANY = "@@ what the assistant says @@"
_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_GIVE_ONE = "Give a jinja file by data.chat_template"
_MEND = f"{_GIVE_ONE}: one whose earlier turns stay as they are, or with {{% generation %}} blocks."


def check_chat_template(cfg: DataConfig, tokenizer_dir: str | Path | None) -> list[Mistake]:
    """Checks that there is a chat template if one is needed; reads only small files.

    Args:
        cfg: The data config.
        tokenizer_dir: A local tokenizer folder; None if the tokenizer is yet to be trained.
    """
    if cfg.format != "chat":
        return []
    if cfg.chat_template is not None:
        if Path(cfg.chat_template).expanduser().is_file():
            return []
        return [Mistake("data.chat_template", cfg.chat_template, "is no file", "Name a jinja file.")]
    if tokenizer_dir is None:
        rule = "the default model's tokenizer has no chat template"
        return [Mistake("data.chat_template", None, rule, f"{_GIVE_ONE}, or set dense.")]
    folder = Path(tokenizer_dir).expanduser()
    if not folder.is_dir() or _has_template(folder):
        return []  # a missing folder is reported by the check of the tokenizer
    rule = f"the tokenizer in {tokenizer_dir} has no chat template"
    return [Mistake("data.chat_template", None, rule, f"{_GIVE_ONE}.")]


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATE_FILES):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def carry_template(cfg: DataConfig, folder: Path) -> None:
    """Writes the run's own chat template into an exported model's folder."""
    if cfg.format == "chat" and cfg.chat_template is not None:
        text = Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
        atomic_write_text(folder / _TEMPLATE_FILES[0], text)


class ChatFormat:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: The tokenizer.
        template: Text of the template.
        marked: Whether the template itself marks the assistant's text.
    """

    def __init__(self, cfg: DataConfig, tokenizer_dir: str | Path) -> None:
        """Loads both.

        Raises:
            DataError: There is no template, or the tokenizer does not return the offsets of tokens.
        """
        mistakes = check_chat_template(cfg, tokenizer_dir)
        if mistakes:
            raise DataError(mistakes)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(tokenizer_dir, append_eos=False)
        if cfg.chat_template is not None:
            file = Path(cfg.chat_template).expanduser()
            self.tokenizer.chat_template = file.read_text(encoding="utf-8")
        if not self.tokenizer.is_fast:
            rule = "does not return the offsets of its tokens in a text"
            remedy = "Convert it to a tokenizer.json (transformers' fast kind)."
            raise DataError.one("tokenizer", str(tokenizer_dir), rule, remedy)
        self.template: str = self.tokenizer.get_chat_template()
        self.marked = _MARKED.search(self.template) is not None

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a conversation and marks the assistant's tokens.

        Returns:
            ``[n]`` int64 ids and ``[n]`` bool; both empty if the assistant says nothing.

        Raises:
            DataError: The template rejects the conversation, or changes earlier turns; names the row.
        """
        if not any(message["role"] == ASSISTANT for message in conversation.messages):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_)
        text, spans = self._render(conversation.messages, conversation.place)
        if not self.marked:
            spans = self._spans(conversation, text)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        own = np.zeros(len(offsets), dtype=np.bool_)
        for start, end in spans:
            own |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return np.array(encoded["input_ids"], dtype=np.int64), own

    def _spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Finds the assistant's replies in the text, as (first character, one past the last)."""
        messages, place = conversation.messages, conversation.place
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            upto, _ = self._render(messages[: i + 1], place)
            other, _ = self._render([*messages[:i], {"role": ASSISTANT, "content": _ANY}], place)
            header = other[: max(other.find(_ANY), 0)]
            if not (_ANY in other and upto.startswith(header) and text.startswith(upto)):
                rule = (
                    f"the template changes the text up to message {i + 1} when the conversation continues, "
                    "so that the reply cannot be located"
                )
                _fail(place, rule, _MEND)
            spans.append((len(header), len(upto)))
        return spans

    def _render(self, messages: list[dict[str, str]], place: str) -> tuple[str, list[tuple[int, int]]]:
        """Renders messages; returns the text and the spans that the template marks."""
        # apply_chat_template drops a marked span that begins with a space that belongs to no token.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, stretches = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # errors of jinja and of the template's expressions
            rule = f"the chat template rejects it ({error})"
            _fail(place, rule, f"Mend or leave out the row. {_GIVE_ONE}.")
        return texts[0], [tuple(pair) for pair in stretches[0]] if self.marked else []


def _fail(place: str, rule: str, remedy: str) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
