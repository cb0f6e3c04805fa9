"""Config of a run's data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.errors import require
from moe.types import Config, unless


@dataclass(frozen=True)
class DataConfig(Config):
    """Config of the documents and of their conversion to samples.

    Attributes:
        path: A file, a glob (``**`` reaches into folders) or a list of these: plain text (one file is one
            document), JSON lines or JSON (``.gz`` and ``.zst`` too), parquet; or the prefix of a Megatron
            ``.bin``/``.idx`` pair. None is the source of the running Python's standard library.
        text_key: The field or column that holds the text of a JSON or parquet record.
        seq_len: Tokens per sample, without the last target.
        validation_fraction: Share of the training tokens set aside, in whole documents. Ignored if
            ``validation_path`` is given.
        validation_path: Documents to validate on, in any form of ``path``; None takes some of ``path``.
        append_eos: Whether to end each document with the tokenizer's end-of-sequence token.
        prepend_bos: Whether to begin each document with the tokenizer's beginning-of-sequence token; ``auto``
            does as the tokenizer does by itself.
        seed: Seed of the split and of the order of documents and samples.
        format: ``text``, or ``chat``: JSON lines of ``{"messages": [{"role": ..., "content": ...}, ...]}``,
            rendered by the tokenizer's chat template; only the assistant's tokens count for the loss.
        chat_template: A jinja file that replaces the tokenizer's own chat template.
        document_mask: Whether no token sees another document of its sample, and positions restart with each
            document. A model that cannot keep them apart is rejected before training.
        ignored_fields: Fields of chat rows and messages that are treated as if they were not there.
    """

    path: str | list[str] | None = None
    text_key: str = "text"
    seq_len: int = 128
    validation_fraction: float = 0.02
    validation_path: str | list[str] | None = None
    append_eos: bool = True
    prepend_bos: bool | Literal["auto"] = "auto"
    seed: int = 0
    format: Literal["text", "chat"] = "text"
    chat_template: str | None = None
    document_mask: bool = True
    ignored_fields: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the values that need no file.

        Raises:
            ValueError: One line for each value that breaks its rule, with a remedy.
        """
        require(
            self,
            (
                bool(self.text_key),
                "text_key",
                "is empty",
                "Name the field that holds the text, such as 'text'.",
            ),
            (self.seq_len >= 1, "seq_len", "must be at least 1", "Give a length such as 128."),
            (
                0 < self.validation_fraction < 1,
                "validation_fraction",
                "must lie between 0 and 1, both excluded",
                "Give a share such as 0.02, or documents of their own by validation_path.",
            ),
            (self.seed >= 0, "seed", "must not be negative", "Give 0 or more."),
            *(
                (
                    getattr(self, name) not in ("", []),
                    name,
                    "is empty",
                    "Name files or a glob, or leave it at null.",
                )
                for name in ("path", "validation_path")
            ),
            (
                self.chat_template is None or self.format == "chat",
                "chat_template",
                "is for chat data",
                "Set data.format=chat.",
            ),
            (
                self.prepend_bos == "auto" or self.format == "text",
                "prepend_bos",
                "is for documents of text",
                "Leave it at auto; a chat template writes the token itself.",
            ),
            (
                not {"messages", "conversations", "role", "content", "from", "value"}
                & {*self.ignored_fields},
                "ignored_fields",
                "names a field that holds the conversation itself",
                "Name other fields of rows and messages, such as 'name'.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return (
            unless(self.validation_path is None, "validation_path is given", "validation_fraction")
            | unless(self.format == "chat", "only format=chat reads it", "chat_template", "ignored_fields")
            | unless(
                self.format == "text",
                "format=chat renders a template",
                "text_key",
                "append_eos",
                "prepend_bos",
            )
        )
