"""Reads the documents of one file: text, JSON lines, JSON, parquet.

JSON is read line by line by the standard library: faults have a line number, and fields other than the text
may change their type between records, which readers that infer one type per field reject.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from moe.errors import DataError

PARQUET_BATCH = 256
"""Rows read from parquet at a time."""

_BROKEN = "Repair or fetch the file again, or leave it out."


class Document(NamedTuple):
    """A text, and the bytes of the file on disk read since the previous document."""

    text: str
    consumed: int


def read_text(path: Path) -> Document:
    """Reads a whole UTF-8 file as one document, without a byte order mark.

    Raises:
        DataError: It is not UTF-8, or its compression is damaged.
    """
    with _opened(path) as (stream, _):
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _fail(f"{path}:{line}", f"is not UTF-8 ({error.reason})", "Convert it to UTF-8, or leave it out.")
    return Document(text, path.stat().st_size)


class Record(NamedTuple):
    """A JSON value, its place, and the bytes read since the previous one."""

    value: Any
    place: str
    consumed: int


def read_json(path: Path, text_key: str) -> Iterator[Document]:
    """Yields the texts of a JSON file: one record per line, or one array of records.

    Raises:
        DataError: A line is not JSON, or a record lacks the text; the message names file and line.
    """
    for record in read_json_records(path):
        yield Document(_text_of(record.value, text_key, record.place), record.consumed)


def read_json_records(path: Path) -> Iterator[Record]:
    """Yields the records of a JSON file, whatever they hold.

    Raises:
        DataError: A line is not JSON; the message names file and line.
    """
    with _opened(path) as (stream, raw):
        if stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _read_array(stream.read(), path)
            return
        before = 0
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            value = _parse(line, place)
            position = raw.tell()
            yield Record(value, place, position - before)
            before = position


def read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    """Streams the rows of a parquet file with Hugging Face ``datasets``; reads only the text column.

    Raises:
        DataError: The file is damaged, or has no such column of text.
    """
    rows = _parquet_rows(path, text_key)
    from datasets import IterableDataset

    # load_dataset would report its use to a server; a name with brackets must not be taken for a glob.
    stream = IterableDataset.from_parquet([glob.escape(str(path))], columns=[text_key])
    share, row = path.stat().st_size / max(rows, 1), 0
    batches = iter(stream.iter(batch_size=PARQUET_BATCH))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # datasets raises errors of pyarrow, fsspec and its own
            _fail(str(path), f"cannot be read after row {row} ({error})", _BROKEN)
        if batch is None:
            return
        for text in batch[text_key]:
            row += 1
            text = _checked_text(text, text_key, f"{path}, row {row}")
            yield Document(text, int(share * row) - int(share * (row - 1)))


def peek_record(path: Path, text_key: str) -> None:
    """Reads the first record of a JSON file, or the columns of a parquet file, to find a mistake early.

    Raises:
        DataError: See `read_json` and `read_parquet`.
    """
    if path.suffix.lower() == ".parquet":
        _parquet_rows(path, text_key)
    else:
        next(read_json(path, text_key), None)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader[Any], BinaryIO]]:
    """Yields the decompressed stream, and the raw file, whose position shows the progress."""
    with path.open("rb") as raw:
        stream: io.BufferedReader[Any] = raw
        if path.suffix.lower() == ".gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif path.suffix.lower() == ".zst":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        try:
            yield stream, raw
        except (OSError, EOFError, zlib.error) as error:
            _fail(str(path), f"cannot be read ({error})", _BROKEN)


def _read_array(raw: bytes, path: Path) -> Iterator[Record]:
    records = _parse(raw, str(path))
    share = path.stat().st_size / max(len(records), 1)
    for i, record in enumerate(records):
        yield Record(record, f"{path}, record {i + 1}", int(share * (i + 1)) - int(share * i))


def _parse(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _fail(place, f"is not UTF-8 ({error.reason})", "Convert the file to UTF-8, or leave it out.")
    except json.JSONDecodeError as error:
        _fail(
            place,
            f"is not JSON ({error.msg} at column {error.colno})",
            "Correct the line: each must be one JSON object.",
        )


def _text_of(record: Any, text_key: str, place: str) -> str:
    if not isinstance(record, dict):
        _fail(place, f"is a JSON {type(record).__name__}, not an object", 'Write records as {"text": ...}.')
    if text_key not in record:
        _fail_key(place, text_key, list(record))
    return _checked_text(record[text_key], text_key, place)


def _checked_text(text: Any, text_key: str, place: str) -> str:
    if not isinstance(text, str):
        rule = f"has a {type(text).__name__} under {text_key!r}, not a text"
        _fail(place, rule, "Set data.text_key to the field of the text, or leave the record out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"has half a surrogate pair at character {error.start}, which cannot be encoded"
        _fail(place, rule, "Correct the \\u escape, or leave the record out.")
    return text


def _parquet_rows(path: Path, text_key: str) -> int:
    """Returns the number of rows; checks that the file is whole and has the column."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        _fail(str(path), f"is not a whole parquet file ({error})", _BROKEN)
    schema = metadata.schema.to_arrow_schema()
    if text_key not in schema.names:
        _fail_key(str(path), text_key, schema.names)
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        rule = f"has a column {text_key!r} of {kind}, not of text"
        _fail(str(path), rule, f"Set data.text_key to one of {schema.names}.")
    return int(metadata.num_rows)


def _fail_key(place: str, text_key: str, keys: list[str]) -> NoReturn:
    rule = f"has no {text_key!r}; it has {', '.join(map(repr, keys)) or 'no fields'}"
    chat = " Or set data=chat for conversations." if {"messages", "conversations"} & set(keys) else ""
    _fail(place, rule, f"Set data.text_key (--text-key) to the one that holds the text.{chat}")


def _fail(place: str, rule: str, remedy: str) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
