"""Reads files of evaluation requests: JSON lines of context and continuation, as OLMo's suite has them.

A row is ``{"request": {"context": ..., "continuation": ...}, "label": ..., "doc_id": ...}``, or has context
and continuation at its top. Rows of one document are the choices of a question, whose label is the index of
the right one; a document with a row of its own has the right continuation alone.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moe.errors import ConfigError
from recipes.runtime.user_json import UserJsonError, read_json_text

_FLAG = "--tasks"
_REMEDY = 'Each line is {"request": {"context": "...", "continuation": "..."}, "label": 0, "doc_id": 0}.'
# A line of a few passages has some 10^4 characters.
_LONGEST = 2**22


@dataclass(frozen=True)
class TaskQuestion:
    """A question of a task.

    Attributes:
        contexts: Context of each choice.
        choices: The choices; one alone where the task has no others.
        gold: Index of the right choice.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions of a file.

    Attributes:
        name: Of the task.
        questions: Its questions, in the order of the file.
    """

    name: str
    questions: tuple[TaskQuestion, ...]


def read_task(text: str, limit: int | None) -> Task:
    """Reads a task.

    Args:
        text: ``[NAME=]FILE``: a file of JSON lines, also gzipped, or ``ARCHIVE.whl!PATH`` for one in a zip.
        limit: Number of questions to read; None for all.

    Raises:
        ConfigError: The file cannot be read, or a row is not as it must be.
    """
    name, equals, path = text.partition("=")
    if not equals or Path(text.partition("!")[0]).expanduser().exists():
        name, path = "", text
    groups = itertools.groupby(_rows(path), key=lambda row: row[1].get("doc_id", row[0]))
    found = [_question([row for _, row in rows], path, doc) for doc, rows in itertools.islice(groups, limit)]
    if not found:
        raise ConfigError.one(_FLAG, path, "it has no rows", "Give at least one line.")
    return Task(name or _name_of(path), tuple(found))


def _name_of(path: str) -> str:
    """Returns the name of a task whose file is ``TASK/VARIANT/requests.jsonl.gz``, else that of the file."""
    parts = Path(path.replace("!", "/")).parts
    return parts[-3] if parts[-1].startswith("requests.") and len(parts) > 2 else parts[-1].partition(".")[0]


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and content of the rows."""
    number = 0
    try:
        with _open(path) as stream:
            while line := stream.readline(_LONGEST):
                number += 1
                if not line.strip():
                    continue
                row = read_json_text(line, "")
                if not isinstance(row, dict):
                    raise ConfigError.one(_FLAG, f"{path}:{number}", "it is not an object, {...}", _REMEDY)
                yield number, row
    except UserJsonError as error:
        raise ConfigError.one(_FLAG, f"{path}:{number}", f"it {error.clause}", _REMEDY) from None
    except (OSError, EOFError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        rule = f"it cannot be read ({error})"
        raise ConfigError.one(_FLAG, path, rule, "Give a file of JSON lines, plain or gzipped.") from None


def _open(path: str) -> IO[str]:
    archive, inside, member = path.partition("!")
    file = Path(archive).expanduser()
    stream: Any = zipfile.ZipFile(file).open(member) if inside else file.open("rb")  # noqa: SIM115
    if path.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=stream)
    return io.TextIOWrapper(stream, encoding="utf-8")


def _question(rows: list[dict[str, Any]], path: str, document: object) -> TaskQuestion:
    """Returns the question of a document's rows.

    Raises:
        ConfigError: A row lacks a text, or the label names no choice.
    """
    where = f"{path}, document {document}"
    parts = [row["request"] if isinstance(row.get("request"), dict) else row for row in rows]
    texts = [(part.get("context"), part.get("continuation")) for part in parts]
    for context, choice in texts:
        if not isinstance(context, str) or not isinstance(choice, str) or not choice:
            raise ConfigError.one(_FLAG, where, "it needs a context and a continuation, texts", _REMEDY)
    gold = rows[0].get("label") if len(rows) > 1 else 0
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(rows):
        rule = f"its label {gold!r} must be an index from 0 to {len(rows) - 1}"
        raise ConfigError.one(_FLAG, where, rule, _REMEDY)
    return TaskQuestion(tuple(c for c, _ in texts), tuple(choice for _, choice in texts), gold)
