"""Reads the documents of one file: text, JSON lines, JSON, parquet.

JSON is read line by line by the standard library: faults have a line number, and fields other than the text
may change their type between records, which readers that infer one type per field reject.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from moe.errors import DataError
from recipes.runtime.user_json import UserJsonError, read_json_text

PARQUET_BATCH = 256
"""Rows read from parquet at a time."""

LARGEST_LINE = 1 << 28
LARGEST_WHOLE = 1 << 32
"""Most bytes, decompressed, of a JSON line and of what is read at once: a text file, a JSON array."""

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
        raw = _read_whole(stream, path)
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
            yield from _read_array(_read_whole(stream, path), path)
            return
        before = 0
        for number, line in enumerate(iter(lambda: stream.readline(LARGEST_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if len(line) > LARGEST_LINE:
                rule = f"is a line of more than {LARGEST_LINE >> 20} MiB, which is not read as one record"
                _fail(place, rule, "Write one record a line, and split larger ones.")
            if not line.strip():
                continue
            value = _parse(line, place)
            position = raw.tell()
            yield Record(value, place, position - before)
            before = position


def read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    """Streams the rows of a parquet file; reads only the text column.

    Raises:
        DataError: The file is damaged, or has no such column of text.
    """
    rows = _parquet_rows(path, text_key)
    share, row = path.stat().st_size / max(rows, 1), 0
    batches = _parquet_texts(path, text_key)
    while True:
        try:
            texts = next(batches, None)
        except Exception as error:  # pyarrow's, and Python's own for bytes that are no text
            _fail(str(path), f"cannot be read after row {row} ({error})", _BROKEN)
        if texts is None:
            return
        for text in texts:
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


def _parquet_texts(path: Path, text_key: str) -> Iterator[list[Any]]:
    """Yields the values of a column in batches."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_BATCH, columns=[text_key]):
            yield batch.column(text_key).to_pylist()


def _read_whole(stream: BinaryIO | io.BufferedReader[Any], path: Path) -> bytes:
    """Reads all that a stream holds, up to a limit."""
    raw = stream.read(LARGEST_WHOLE + 1)
    if len(raw) > LARGEST_WHOLE:
        rule = f"holds more than {LARGEST_WHOLE >> 20} MiB that would be read at once"
        _fail(str(path), rule, "Split it into several files, or write JSON lines.")
    return raw


def _read_array(raw: bytes, path: Path) -> Iterator[Record]:
    records = _parse(raw, str(path))
    share = path.stat().st_size / max(len(records), 1)
    for i, record in enumerate(records):
        yield Record(record, f"{path}, record {i + 1}", int(share * (i + 1)) - int(share * i))


def _parse(raw: bytes, place: str) -> Any:
    try:
        return read_json_text(raw, place)
    except UserJsonError as error:
        _fail(place, error.clause, "Correct the line: each must be one JSON object, in UTF-8.")


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
        schema = metadata.schema.to_arrow_schema()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        _fail(str(path), f"is not a whole parquet file ({error})", _BROKEN)
    if text_key not in schema.names:
        _fail_key(str(path), text_key, schema.names)
    if schema.names.count(text_key) > 1:
        _fail(str(path), f"has several columns {text_key!r}", "Write it again with one of them.")
    kind = schema.field(text_key).type
    if not _is_text(kind):
        others = [field.name for field in schema if _is_text(field.type)]
        remedy = f"Set data.text_key to one of {others}." if others else "Write the column as strings."
        _fail(str(path), f"has a column {text_key!r} of {kind}, not of text", remedy)
    return int(metadata.num_rows)


def _is_text(kind: Any) -> bool:
    """Returns whether a type of Arrow holds text, as such or by numbers into a dictionary (categories)."""
    from pyarrow import types

    held = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(held) or types.is_large_string(held) or types.is_string_view(held))


def _fail_key(place: str, text_key: str, keys: list[str]) -> NoReturn:
    rule = f"has no {text_key!r}; it has {', '.join(map(repr, keys)) or 'no fields'}"
    chat = " Or set data=chat for conversations." if {"messages", "conversations"} & set(keys) else ""
    _fail(place, rule, f"Set data.text_key (--text-key) to the one that holds the text.{chat}")


def _fail(place: str, rule: str, remedy: str) -> NoReturn:
    raise DataError.one("data.path", place, rule, remedy)
