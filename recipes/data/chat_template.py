"""Renders a conversation to token ids, and marks those that the assistant has written.

A template with ``{% generation %}`` blocks marks them itself. For others, the conversation is rendered up to
each reply, see `recipes.data.reply_spans`: what the template writes before any reply is not the assistant's;
the reply is, up to and with the token that ends its turn. The template must not change earlier turns when
later ones are added, which is checked.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from moe.errors import DataError, Mistake
from recipes.data.code_limits import TimeIsUp, memory_limit, time_limit
from recipes.data.config import DataConfig
from recipes.data.conversations import ASSISTANT, Conversation
from recipes.data.reply_spans import (
    Messages,
    Span,
    SpanError,
    check_replies,
    check_written,
    counted_replies,
    find_span,
)
from recipes.data.span_tokens import mark_spans
from recipes.data.tokenizer import load_tokenizer, require_room
from recipes.runtime.atomic import atomic_write_text
from recipes.runtime.user_json import UserJsonError, read_json_file, read_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 60.0
"""Longest time that a template may take over one conversation."""

RENDER_BYTES = 1 << 30
"""Most memory that it may take."""

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
_TEMPLATE_FILE = "chat_template.jinja"
_GIVE_ONE = "Give a jinja file by data.chat_template"
_MEND = (
    f"{_GIVE_ONE}: one that writes all and leaves earlier turns as they are; or leave the row out, or list "
    "fields that may be dropped in data.ignored_fields."
)


def check_chat_template(cfg: DataConfig, tokenizer_dir: str | Path | None) -> list[Mistake]:
    """Checks that there is a chat template if one is needed; reads only small files.

    Args:
        cfg: The data config.
        tokenizer_dir: A local tokenizer folder; None if the tokenizer is yet to be trained.
    """
    if cfg.format != "chat":
        return []
    if cfg.chat_template is not None:
        fault = _read_template(cfg.chat_template)[1]
        if fault is None:
            return []
        return [Mistake("data.chat_template", cfg.chat_template, fault, "Name a jinja file.")]
    if tokenizer_dir is None:
        rule = "the default model's tokenizer has no chat template"
        return [Mistake("data.chat_template", None, rule, f"{_GIVE_ONE}, or set dense.")]
    folder = Path(tokenizer_dir).expanduser()
    lack = _lacks_template(folder) if folder.is_dir() else None
    if lack is None:
        return []  # a missing folder is reported by the check of the tokenizer
    rule = f"the tokenizer in {tokenizer_dir} {lack}"
    return [Mistake("data.chat_template", None, rule, f"{_GIVE_ONE}.")]


def _read_template(name: str) -> tuple[str, str | None]:
    """Returns the text of a jinja file, and what is wrong with it."""
    path = Path(name).expanduser()
    if not path.is_file():
        return "", "is no file"
    try:
        return read_regular(path).decode(), None
    except UserJsonError as error:
        return "", error.clause
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 ({error.reason})"


def _lacks_template(folder: Path) -> str | None:
    """Returns why transformers finds no template in a tokenizer's folder, or None if it does."""
    if (folder / _TEMPLATE_FILE).is_file():
        return None
    names = [path.stem for path in (folder / "additional_chat_templates").glob("*.jinja")]
    try:
        settings = read_json_file(folder / "tokenizer_config.json")
    except UserJsonError:
        settings = None  # reported by the check of the tokenizer, if the file is there
    given = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(given, str) and given and not names:
        return None
    if isinstance(given, list) and not names:
        if not all(isinstance(one, dict) and isinstance(one.get("template"), str) for one in given):
            return "has a list of chat templates that are not all a name and a template"
        names = [str(one.get("name")) for one in given]
    if "default" in names:
        return None
    if names:
        return f"has chat templates named {', '.join(sorted(names))}, and none named default"
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            return f"has no chat template of its own; that in {name} is a processor's"
    return "has no chat template"


def carry_template(cfg: DataConfig, folder: Path) -> None:
    """Writes the run's own chat template into an exported model's folder."""
    if cfg.format == "chat" and cfg.chat_template is not None:
        atomic_write_text(folder / _TEMPLATE_FILE, _read_template(cfg.chat_template)[0])


class ChatFormat:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: The tokenizer.
        template: Text of the template.
        tool_template: The same for conversations with tools; most tokenizers have one for all.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer_dir: str | Path, *, trust_remote_code: bool = False
    ) -> None:
        """Loads both.

        Raises:
            DataError: There is no template, or the tokenizer cannot be used.
        """
        mistakes = check_chat_template(cfg, tokenizer_dir)
        if mistakes:
            raise DataError(mistakes)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            tokenizer_dir, append_eos=False, trust_remote_code=trust_remote_code
        )
        if cfg.chat_template is not None:
            self.tokenizer.chat_template = _read_template(cfg.chat_template)[0]
        self.template: str = self.tokenizer.get_chat_template()
        self.tool_template: str = self.tokenizer.get_chat_template(tools=[])
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = [*special, str(self.tokenizer.eos_token or "")]

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a conversation and marks the assistant's tokens.

        Returns:
            ``[n]`` int64 ids and ``[n]`` bool; both empty if the assistant says nothing that counts.

        Raises:
            DataError: The template rejects the conversation, changes earlier turns, does not write all that
                was said, or does not end; names the row.
        """
        if not counted_replies(conversation):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_)
        try:
            with time_limit(RENDER_SECONDS), memory_limit(RENDER_BYTES):
                text, spans = self._render_calls(conversation)
        except SpanError as error:
            _fail(conversation.place, str(error), _MEND)
        except TimeIsUp:
            rule = f"the chat template does not end within {RENDER_SECONDS:g} seconds"
            _fail(conversation.place, rule, f"Mend its loops, or leave out the row. {_GIVE_ONE}.")
        require_room(len(text))
        try:
            return mark_spans(self.tokenizer, text, spans)
        except SpanError as error:
            _fail(
                conversation.place, str(error), "Leave it out, or use a tokenizer.json, which tells offsets."
            )

    def _render_calls(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Renders; some templates write a call only where the message has null as its content."""
        bare = [
            message | {"content": message["content"] or None} if "tool_calls" in message else message
            for message in conversation.messages
        ]
        try:
            return self._render_checked(conversation)
        except SpanError:
            if bare != conversation.messages:
                with suppress(SpanError):  # the first error is the one to tell
                    return self._render_checked(conversation._replace(messages=bare))
            raise

    def _render_checked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Renders a conversation; returns the text and the spans of the replies that count."""

        def render(messages: Messages, *, tools: bool = True, prompt: bool = False) -> str:
            return self._render(messages, conversation.tools if tools else None, prompt)[0]

        text, marked = self._render(conversation.messages, conversation.tools)
        spans: dict[int, Span] | list[Span]
        if marked is None:
            messages, counted = conversation.messages, counted_replies(conversation)
            spans = {i: find_span(render, messages, i, text, self._ends) for i in counted}
        else:
            spans = _spans_of_counted(conversation, marked)
            self._check_marked_calls(conversation, text, marked)
        check_replies(conversation, text, spans)
        check_written(render, conversation, text)
        return text, list(spans.values()) if isinstance(spans, dict) else spans

    def _check_marked_calls(self, conversation: Conversation, text: str, marked: list[Span]) -> None:
        """Checks that a template that marks replies has calls of tools inside of them.

        Raises:
            SpanError: They change what it writes outside.
        """
        less = [
            {name: value for name, value in message.items() if name != "tool_calls"}
            for message in conversation.messages
        ]
        if less == conversation.messages:
            return
        other, other_marked = self._render(less, conversation.tools)
        if _outside(text, marked) != _outside(other, other_marked or []):
            raise SpanError("the template writes calls of tools outside of the replies that it marks")

    def _render(
        self, messages: Messages, tools: list[dict[str, Any]] | None, prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """Renders messages; returns the text, and the spans that the template marks, if it marks any."""
        # apply_chat_template drops a marked span that begins with a space that belongs to no token.
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tool_template if tools else self.template
        marked = _MARKED.search(template) is not None
        try:
            texts, stretches = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except MemoryError:
            raise SpanError(f"the chat template takes more than {RENDER_BYTES >> 20} MiB of memory") from None
        except Exception as error:  # errors of jinja and of the template's expressions
            raise SpanError(f"the chat template rejects it ({error})") from None
        return texts[0], [tuple(pair) for pair in stretches[0]] if marked else None


def _spans_of_counted(conversation: Conversation, marked: list[Span]) -> dict[int, Span] | list[Span]:
    """Assigns the spans that a template marks to replies, one each; other numbers are for all together.

    Raises:
        SpanError: Some replies do not count, and it cannot be told which spans are theirs.
    """
    replies = [i for i, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
    counted = counted_replies(conversation)
    if len(replies) == len(marked):
        return {i: span for i, span in zip(replies, marked, strict=True) if i in counted}
    if len(replies) == len(counted):
        return marked
    raise SpanError(
        f"the template marks {len(marked)} stretches for {len(replies)} replies, so that those that do not "
        "count cannot be told from the others"
    )


def _outside(text: str, spans: list[Span]) -> list[str]:
    """Returns the words outside of spans."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return "".join(text[a:b] for a, b in zip(ends, starts, strict=True)).split()


def _fail(place: str, rule: str, remedy: str) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
