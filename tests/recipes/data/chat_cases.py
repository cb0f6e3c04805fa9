"""A tokenizer small enough to write its ids by hand, templates for it, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["<pad>", "<s>", "<sys>", "<user>", "<bot>", "<end>", "a", "b", "c", "d", "e", "f"]
PAD, BOS, SYS, USER, BOT, END, A, B, C, D, E, F = range(12)

# <s> <user> a b <end> <bot> c <end> ...: the header of a reply is <bot>, its end <end>.
PLAIN = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'assistant' %}<bot>{% elif m.role == 'system' %}<sys>{% else %}<user>{% endif %} "
    "{{ m.content }} <end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
# The same, and the template itself says what the assistant's is.
MARKED = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<bot>"
    "{% generation %} {{ m.content }} <end>{% endgeneration %}"
    "{% else %}{% if m.role == 'system' %}<sys>{% else %}<user>{% endif %} {{ m.content }} <end>{% endif %}"
    "{% endfor %}"
)
# Without any header, as Llama 2 and Mistral have it.
BARE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} <end>"
    "{% else %}<user> {{ m.content }} <user>{% endif %}{% endfor %}"
)
# The end is written once, behind the last turn: what stands before it changes when more turns follow.
LAST_ONLY = "{% for m in messages %}<user> {{ m.content }}{% if loop.last %} <end>{% endif %}{% endfor %}"
# Earlier replies lose their first word, as reasoning models drop thoughts.
FORGETS = (
    "{% for m in messages %}<bot>{% if m.role == 'assistant' and not loop.last %}"
    " {{ m.content.split(' ')[1:] | join(' ') }}{% else %} {{ m.content }}{% endif %}{% endfor %}"
)


def save_tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer of whole words with this chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", additional_special_tokens=WORDS[2:5]
    )
    wrapped.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)
    return folder


def talk(*turns: str) -> dict[str, Any]:
    """A row: "sys: a b", "user: c", "bot: d"."""
    roles = {"sys": "system", "user": "user", "bot": "assistant"}
    split = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": roles[who], "content": what} for who, _, what in split]}


def write_rows(path: Path, rows: list[Any]) -> str:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
