"""Resolves ``data.path`` to files, checks them, and reads their documents.

Resolving touches only names and sizes, so that mistakes are reported at once; imports are left to reading.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe.errors import DataError, Mistake
from recipes.data.config import DataConfig
from recipes.data.conversations import peek_conversation, read_conversations
from recipes.data.documents import Document, peek_record, read_json, read_parquet, read_text
from recipes.data.indexed import IndexedDataset, bin_path, idx_path
from recipes.data.same_files import shared_files

Kind = Literal["stdlib", "text", "json", "parquet", "indexed"]

_TEXT_NAMES = (
    "txt text md markdown rst tex html htm xml css yaml yml toml ini cfg py pyi c h cc cpp cxx hpp cu cuh "
    "java js ts jsx tsx go rs rb php cs swift kt scala hs ml lua pl r jl sh sql"
)
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT_NAMES.split())
JSON_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))
COMPRESSIONS = frozenset((".gz", ".zst"))
SHOWN = 5
"""Number of files with the same mistake that are named."""

_NOT_STDLIB = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
_READABLE = "Text (.txt .md .py ...), .jsonl, .json (each also .gz or .zst) and .parquet can be read"


@dataclass(frozen=True)
class Sources:
    """Files that were found, all of one kind.

    Attributes:
        kind: Kind of the files, which decides how they are read.
        files: Absolute paths in the order of reading; for ``indexed`` the one prefix.
    """

    kind: Kind
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Total size of the files on disk, as stored."""
        return sum(path.stat().st_size for path in self._on_disk())

    @property
    def of_tokens(self) -> tuple[Path, ...]:
        """Files that hold the text or the tokens."""
        return self._on_disk()[:1] if self.kind == "indexed" else self.files

    def _on_disk(self) -> tuple[Path, ...]:
        if self.kind == "indexed":
            return (bin_path(self.files[0]), idx_path(self.files[0]))
        return self.files


def check_paths(cfg: DataConfig, prefix: str = "data") -> list[Mistake]:
    """Finds all mistakes in the paths that show without reading the files through.

    Args:
        cfg: The data config.
        prefix: Path of the data config in the whole config; mistakes name ``PREFIX.path``.
    """
    if cfg.blend:
        return _check_blend(cfg, prefix)
    train, mistakes = _inspect(cfg.path, f"{prefix}.path", cfg)
    if cfg.validation_path is None:
        return mistakes
    where = f"{prefix}.validation_path"
    validation, more = _inspect(cfg.validation_path, where, cfg)
    mistakes += more
    if train and validation:
        shared = shared_files(train.of_tokens, validation.of_tokens)
        remedy = "Leave it out of one of them; a model is not validated on what it was trained on."
        mistakes += _capped(where, shared, f"is also in {prefix}.path, by name, link or content", remedy)
    return mistakes


def _check_blend(cfg: DataConfig, prefix: str) -> list[Mistake]:
    """Finds the mistakes in every source, and documents that one trains on and another validates on."""
    mistakes, train = list[Mistake](), list[Path]()
    for i, own in enumerate(cfg.sources()):
        mistakes += check_paths(own, f"{prefix}.blend[{i}]")
        train += resolve(own).of_tokens if not mistakes else ()
    for i, each in enumerate(cfg.blend if not mistakes else ()):
        if each.validation_path is not None:
            shared = shared_files(train, resolve(cfg.of(each.validation_path)).of_tokens)
            remedy = "Leave it out of one of them; a model is not validated on what it was trained on."
            where = f"{prefix}.blend[{i}].validation_path"
            mistakes += _capped(where, shared, "is also trained on, by name, link or content", remedy)
    return mistakes


def resolve(cfg: DataConfig, prefix: str = "data") -> Sources:
    """Returns the files that ``cfg.path`` names.

    Raises:
        DataError: Mistakes were found; it holds all of them.
    """
    assert not cfg.blend, "each source of a blend is resolved by itself"
    sources, mistakes = _inspect(cfg.path, f"{prefix}.path", cfg)
    if mistakes:
        raise DataError(mistakes)
    assert sources is not None, f"{cfg.path!r} gave neither files nor a mistake"
    return sources


def read_documents(cfg: DataConfig, log: Callable[[str], None]) -> Iterator[Document]:
    """Streams the documents of ``cfg.path`` in a fixed order; of a conversation, the text of its messages.

    Args:
        cfg: Gives the files, and the key of the text in a record.
        log: Takes a line on files of the standard library that are skipped because they are not UTF-8.

    Raises:
        DataError: A file cannot be read; gives its name and, if possible, the line.
    """
    if cfg.blend:
        for own in cfg.sources():
            yield from read_documents(own, log)
        return
    sources = resolve(cfg)
    if sources.kind == "indexed":
        raise DataError.one(
            "data.path",
            str(sources.files[0]),
            "is already tokenised",
            "Use it unchanged, or name the text it came from.",
        )
    skipped = []
    for path in sources.files:
        if cfg.format == "chat":
            for conversation in read_conversations(path, cfg.ignored_fields):
                text = "\n".join(message["content"] for message in conversation.messages)
                yield Document(text, conversation.consumed)
        elif sources.kind == "json":
            yield from read_json(path, cfg.text_key)
        elif sources.kind == "parquet":
            yield from read_parquet(path, cfg.text_key)
        else:
            try:
                yield read_text(path)
            except DataError:
                if sources.kind != "stdlib":
                    raise
                skipped.append(path.name)
    if skipped:
        log(f"data: skipped {len(skipped)} standard library files that are not UTF-8: {', '.join(skipped)}")


def fingerprint(cfg: DataConfig) -> str:
    """Computes a hex sha256 of names, sizes and times of the files, text key, and what is put around texts.

    For the standard library, it covers the Python version and the names and sizes of the files.
    """
    if cfg.blend:
        return hashlib.sha256(" ".join(map(fingerprint, cfg.sources())).encode()).hexdigest()
    sources = resolve(cfg)
    parts: list[object] = [sources.kind, cfg.text_key, cfg.append_eos, cfg.prepend_bos]
    if cfg.format == "chat":
        parts = ["chat", sorted(cfg.ignored_fields)]
    if sources.kind == "stdlib":
        root = _stdlib_root()
        parts += [platform.python_version()]
        parts += [(path.relative_to(root).as_posix(), path.stat().st_size) for path in sources.files]
    else:
        for path in sources._on_disk():
            stat = path.stat()
            parts.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> tuple[Path, ...]:
    root, found = _stdlib_root(), []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _inspect(
    given: str | Sequence[str] | None, where: str, cfg: DataConfig
) -> tuple[Sources | None, list[Mistake]]:
    """Returns the sources that a path names, or the mistakes in it."""
    chat = cfg.format == "chat"
    if given is None and chat:
        return None, [Mistake(where, None, "there is no chat data to fall back on", "Name files of it.")]
    if given is None:
        return Sources("stdlib", _stdlib_files()), []
    found: dict[Path, Kind] = {}
    mistakes: list[Mistake] = []
    for entry in [given] if isinstance(given, str) else given:
        try:
            files, wrong = _expand(entry, where)
        except (
            OSError,
            ValueError,
        ) as error:  # a name too long, a folder closed to us
            cause = getattr(error, "strerror", None) or error
            remedy = "Check the name, and the permissions of its folders."
            files, wrong = {}, [Mistake(where, entry, f"is no path ({cause})", remedy)]
        mistakes += wrong
        found.update(files)
    if not mistakes:
        mistakes = _check_together(found, where)
    if mistakes:
        return None, mistakes
    kind = next(iter(found.values()))
    sources = Sources(kind, tuple(found))
    if chat and kind != "json":
        remedy = "Give .jsonl or .json (also .gz or .zst), or set data.format=text."
        return None, [Mistake(where, str(sources.files[0]), f"chat data is JSON, and this is {kind}", remedy)]
    try:
        if kind in ("json", "parquet"):
            first = next(path for path in found if path.stat().st_size)
            peek_conversation(first, cfg.ignored_fields) if chat else peek_record(first, cfg.text_key)
        elif kind == "indexed":
            IndexedDataset(sources.files[0])
    except DataError as error:
        return None, [Mistake(where, m.value, m.rule, m.remedy) for m in error.mistakes]
    return sources, []


def _expand(entry: str, where: str) -> tuple[dict[Path, Kind], list[Mistake]]:
    """Returns the files that one path or glob names, with their kinds, in sorted order."""
    path = Path(entry).expanduser()
    prefix = _indexed_prefix(path)
    if prefix is not None:
        missing = [p for p in (bin_path(prefix), idx_path(prefix)) if not p.is_file()]
        if missing:
            remedy = "A tokenised pair needs both; tokenise again or copy the missing one beside it."
            return {}, [Mistake(where, entry, f"lacks {missing[0].name}", remedy)]
        return {prefix.absolute(): "indexed"}, []
    if path.is_dir():
        remedy = f"Name its files by a glob, such as '{entry.rstrip('/')}/**/*.txt'."
        return {}, [Mistake(where, entry, "is a folder", remedy)]
    if path.exists():
        return _by_kind([path], where)
    if not glob.has_magic(entry):
        return {}, [Mistake(where, entry, "does not exist", f"Check the name; relative to {Path.cwd()}.")]
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    matches = [match for match in matches if not match.is_dir()]
    if not matches:
        remedy = f"Check the pattern; relative to {Path.cwd()}, and ** reaches into folders."
        return {}, [Mistake(where, entry, "matches no file", remedy)]
    return _by_kind(matches, where)


def _indexed_prefix(path: Path) -> Path | None:
    """Returns the prefix if the path means a Megatron pair, by either suffix or by files beside it."""
    if path.suffix in (".bin", ".idx") and not glob.has_magic(str(path)):
        return path.with_suffix("")
    beside = bin_path(path).is_file() or idx_path(path).is_file()
    return path if beside and not path.is_file() else None


def _by_kind(paths: Sequence[Path], where: str) -> tuple[dict[Path, Kind], list[Mistake]]:
    found: dict[Path, Kind] = {}
    odd = [path for path in paths if not path.is_file()]
    if odd:  # reading a pipe may wait for ever
        return {}, _capped(where, odd, "is no regular file", "Write what it holds to a file, and name that.")
    unknown = []
    for path in paths:
        kind = _kind_of(path)
        if kind is None:
            unknown.append(path)
        else:
            found[path.absolute()] = kind
    remedy = f"{_READABLE}; narrow the glob, or rename or convert the file."
    return found, _capped(where, unknown, "has a suffix of no known format", remedy)


def _kind_of(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "json"
    return "text" if suffix in TEXT_SUFFIXES else None


def _check_together(found: dict[Path, Kind], where: str) -> list[Mistake]:
    """Checks the files as a set: kinds, permissions, sizes."""
    first_of: dict[Kind, Path] = {}
    for path, kind in found.items():
        first_of.setdefault(kind, path)
    if len(first_of) > 1:
        shown = ", ".join(f"{kind} ({path})" for kind, path in first_of.items())
        return [
            Mistake(
                where, shown, "mixes kinds of file", "Give one kind in a run; narrow the glob or the list."
            )
        ]
    kind = next(iter(first_of))
    if kind == "indexed":
        if len(found) == 1:
            return []
        remedy = "Merge them by Megatron's merge_datasets, or name one."
        return [Mistake(where, [str(p) for p in found], "names several tokenised pairs", remedy)]
    unreadable = [path for path in found if not os.access(path, os.R_OK)]
    if unreadable:
        return _capped(where, unreadable, "may not be read", "Change its permissions, or leave it out.")
    empty = [path for path in found if path.stat().st_size == 0]
    # Among many files an empty __init__.py or shard is normal; an empty parquet file is always damaged.
    if empty and (kind == "parquet" or len(empty) == len(found)):
        return _capped(where, empty, "is empty", "Write it again, or leave it out.")
    return []


def _capped(where: str, paths: Sequence[Path], rule: str, remedy: str) -> list[Mistake]:
    """Makes one mistake per path, or for the first few with a count of the others."""
    mistakes = [Mistake(where, str(path), rule, remedy) for path in paths[:SHOWN]]
    if len(paths) > SHOWN:
        last = mistakes[-1]
        mistakes[-1] = Mistake(where, last.value, f"{rule} (and {len(paths) - SHOWN} more like it)", remedy)
    return mistakes
