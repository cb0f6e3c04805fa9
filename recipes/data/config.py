"""Config of a run's data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from moe.errors import Rule, require
from moe.types import Config, unless

BLOCK = 4096
"""Samples in which the shares of a blend are kept; no share is smaller than one of them."""


@dataclass(frozen=True)
class BlendConfig(Config):
    """Config of a source of a blend.

    Attributes:
        path: Its documents, in any form of ``data.path``.
        weight: Its share of the training samples, relative to the other weights.
        name: Name in metrics and messages; None is ``source1`` and so on.
        max_epochs: Most passes over its training documents; None allows any number.
        validation_path: Documents to validate on; None takes ``data.validation_fraction`` of ``path``.
    """

    path: str | list[str]
    weight: float
    name: str | None = None
    max_epochs: float | None = None
    validation_path: str | list[str] | None = None

    def __post_init__(self) -> None:
        """Checks the values that need no file."""
        more = "Give a number above 0"
        require(
            self,
            (self.path not in ("", []), "path", "is empty", "Name files or a glob."),
            (self.weight > 0, "weight", "must be positive", f"{more}; weights need not sum to 1."),
            (
                self.name is None or bool(re.fullmatch(r"[\w.-]+", self.name, re.ASCII)),
                "name",
                "is no name of a metric",
                "Use letters, digits, '_', '-' and '.'.",
            ),
            (self.max_epochs is None or self.max_epochs > 0, "max_epochs", "must be positive", f"{more}."),
            (self.validation_path not in ("", []), "validation_path", "is empty", "Name files, or leave it."),
        )


@dataclass(frozen=True)
class DataConfig(Config):
    """Config of the documents and of their conversion to samples.

    Attributes:
        path: A file, a glob (``**`` reaches into folders) or a list of these: plain text (one file is one
            document), JSON lines or JSON (``.gz`` and ``.zst`` too), parquet; or the prefix of a Megatron
            ``.bin``/``.idx`` pair. None is ``blend``, or the source of the running Python's standard library.
        blend: Sources that are mixed by weight, in place of ``path``: each ``{path, weight}``, and if wanted
            ``name``, ``max_epochs`` and ``validation_path`` (docs/data.md).
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
    blend: list[BlendConfig] = field(default_factory=list)
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
            *self._blend_rules(),
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

    def _blend_rules(self) -> Iterator[Rule]:
        if not self.blend:
            return
        names, least = self.names, min(self.shares)
        yield self.path is None, "path", "is given beside data.blend", "Give one of the two."
        remedy = "Give it in the entries of data.blend."
        yield self.validation_path is None, "validation_path", "is given beside data.blend", remedy
        yield (
            self.format == "text",
            "format",
            "a blend is of text",
            "Set data.format=text, or give data.path.",
        )
        yield len(set(names)) == len(names), "blend", "has a name twice", "Give each source another name."
        rule = f"has a share of {float(least):.1e}, and the smallest that is kept is 1/{BLOCK}"
        yield least * BLOCK >= 1, "blend", rule, "Raise that weight, or leave the source out."

    @property
    def names(self) -> list[str]:
        """Names of the sources of a blend."""
        return [each.name or f"source{i}" for i, each in enumerate(self.blend, start=1)]

    @property
    def shares(self) -> list[Fraction]:
        """Shares of the sources of a blend: the weights as they are written in decimal, over their sum."""
        exact = [Fraction(str(each.weight)) for each in self.blend]
        return [weight / sum(exact) for weight in exact]

    def sources(self) -> list[DataConfig]:
        """Returns a config of each source: those of a blend, or this one."""
        return [self.of(each.path, each.validation_path) for each in self.blend] or [self]

    def of(self, path: str | list[str] | None, validation_path: str | list[str] | None = None) -> DataConfig:
        """Returns the same options with other documents."""
        return replace(self, path=path, validation_path=validation_path, blend=[])

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
