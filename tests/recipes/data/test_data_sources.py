"""Which files a path names, what is wrong with them, and the documents in them."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.errors import DataError
from recipes.data import documents
from recipes.data.config import DataConfig
from recipes.data.indexed import IndexedWriter
from recipes.data.sources import check_paths, fingerprint, read_documents, resolve
from tests.paths import ROOT

RECORDS = [{"text": "one", "n": 1}, {"text": "two\nlines \u00e9", "n": "2"}, {"n": None, "text": ""}]
TEXTS = [record["text"] for record in RECORDS]


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def texts(path: Any, **settings: Any) -> list[str]:
    return [document.text for document in read_documents(DataConfig(path=path, **settings), print)]


def rules(path: Any, **settings: Any) -> str:
    mistakes = check_paths(DataConfig(path=path, **settings))
    assert all(m.remedy.endswith(".") for m in mistakes)
    return "\n".join(map(str, mistakes))


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def zstd(raw: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(RECORDS)),
        ("blank.ndjson", b"\n" + lines(RECORDS).replace(b"\n", b"\r\n\n")),
        ("a.json", lines(RECORDS)),
        ("array.json", json.dumps(RECORDS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS), mtime=0)),
        ("a.jsonl.zst", zstd(lines(RECORDS))),
        ("array.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
    ],
)
def test_json_in_every_dress(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    assert rules(str(tmp_path / name)) == ""
    found = list(read_documents(DataConfig(path=str(tmp_path / name)), print))
    assert [document.text for document in found] == TEXTS
    assert 0 <= sum(document.consumed for document in found) <= len(raw)


def test_fields_may_change_type_far_into_a_file(tmp_path: Path) -> None:
    """Readers that infer a schema from the first block refuse this file, or read dates as numbers."""
    records = [{"text": "2020-01-01", "meta": i} for i in range(20000)] + [
        {"text": "x" * 1000, "meta": "s"}
    ] * 2000
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    assert texts(str(tmp_path / "a.jsonl")) == [record["text"] for record in records]


def test_parquet(tmp_path: Path) -> None:
    expected = [f"document {i} \u00e9" for i in range(1000)]
    path = write_parquet(tmp_path / "a[1].parquet", {"id": list(range(1000)), "body": expected})
    assert rules(str(path), text_key="body") == ""
    found = list(read_documents(DataConfig(path=str(path), text_key="body"), print))
    assert [document.text for document in found] == expected
    assert sum(document.consumed for document in found) == path.stat().st_size


def test_parquet_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*address: object) -> None:
        raise AssertionError(f"reading a local file looked for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert texts(str(write_parquet(tmp_path / "a.parquet", {"text": ["x"]}))) == ["x"]


def test_text_globs_and_lists_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.md", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>\r\n", newline="")
    assert texts(str(tmp_path / "?.txt")) == ["<a.txt>\r\n", "<b.txt>\r\n"]
    everything = ["<a.txt>", "<b.txt>", "<other.txt>", "<sub/d.md>", "<sub/deep/c.txt>"]
    assert [text.strip() for text in texts(str(tmp_path / "**/*.*"))] == everything
    listed = texts([str(tmp_path / "other.txt"), str(tmp_path / "*.txt")])
    assert [text.strip() for text in listed] == ["<other.txt>", "<a.txt>", "<b.txt>"]
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfzipped"))
    assert texts(str(tmp_path / "g.txt.gz")) == ["zipped"]


def test_a_name_with_brackets_is_first_of_all_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts(str(tmp_path / "a[1].txt")) == ["brackets"]


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert texts("~/*.txt") == texts("~/a.txt") == texts("a.txt") == ["here"]
    assert resolve(DataConfig(path="a.txt")).files == (tmp_path / "a.txt",)


def test_standard_library_by_default() -> None:
    assert check_paths(DataConfig()) == []
    sources = resolve(DataConfig())
    names = {part for path in sources.files for part in path.parts[-3:]}
    assert {"argparse.py", "json", "asyncio"} <= names
    assert not names & {"site-packages", "dist-packages", "test", "__pycache__", "idle_test"}
    assert 8e6 < sources.num_bytes < 40e6
    said: list[str] = []
    found = list(read_documents(DataConfig(), said.append))
    skipped = len(sources.files) - len(found)
    assert bool(said) == bool(skipped)


def test_mistakes_in_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.docx").write_text("a")
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "half.bin").write_bytes(b"12")
    (tmp_path / "e.parquet").touch()
    root = str(tmp_path)
    expected = {
        "x" * 5000: "xxx.*: is no path .File name too long.. Check the name",
        f"{root}/none.txt": "data.path='.*none.txt': does not exist. Check the name; relative to /",
        f"{root}/*.csv": r"\*.csv': matches no file. Check the pattern",
        root: r"is a folder. Name its files by a glob, such as '.*/\*\*/\*.txt'",
        f"{root}/a.docx": r"a.docx': has a suffix of no known format. Text .*\.parquet can be read; narrow",
        f"{root}/empty.txt": "empty.txt': is empty. Write it again",
        f"{root}/e.parquet": "e.parquet': is empty",
        f"{root}/half": "half': lacks half.idx. A tokenised pair needs both",
        f"{root}/half.bin": "half.bin': lacks half.idx",
        f"{root}/gone.idx": "gone.idx': lacks gone.bin",
    }
    for path, message in expected.items():
        with pytest.raises(DataError, match=message):
            resolve(DataConfig(path=path))
    assert "mixes kinds of file. Give one kind" in rules([f"{root}/a.txt", f"{root}/a.jsonl"])
    found = check_paths(DataConfig(path=list(expected), validation_path=f"{root}/nothing"), prefix="run.data")
    assert len(found) == len(expected) + 1 - 2  # emptiness is looked at once the names are right
    assert {m.path for m in found} == {"run.data.path", "run.data.validation_path"}
    # An empty file among others is ordinary, such as __init__.py.
    assert rules([f"{root}/a.txt", f"{root}/empty.txt"]) == ""


def test_many_mistakes_of_one_kind_are_counted(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.xyz").write_text("a")
    found = check_paths(DataConfig(path=str(tmp_path / "*")))
    assert len(found) == 5
    assert "(and 45 more like it)" in found[-1].rule


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert "may not be read. Change its permissions" in rules(str(tmp_path / "a.txt"))


def test_validation_on_training_files_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = rules(str(tmp_path / "*.txt"), validation_path=str(tmp_path / "b.txt"))
    assert "data.validation_path=" in found
    assert "b.txt': is also in data.path" in found
    assert rules(str(tmp_path / "a.txt"), validation_path=str(tmp_path / "b.txt")) == ""


def test_validation_on_links_to_training_files_and_copies_is_refused(tmp_path: Path) -> None:
    train = tmp_path / "t.txt"
    train.write_text("ab" * 100_000)
    (tmp_path / "v0.txt").symlink_to(train)
    (tmp_path / "v1.txt").hardlink_to(train)
    (tmp_path / "v2.txt").write_text(train.read_text())
    (tmp_path / "v3.txt").write_text("ab" * 50_000 + "ba" + "ab" * 49_999)  # as long, and the ends are alike
    (tmp_path / "v4.txt").touch()
    found = check_paths(DataConfig(path=str(train), validation_path=str(tmp_path / "v*.txt")))
    assert [Path(m.value).name for m in found] == ["v0.txt", "v1.txt", "v2.txt"]
    assert found[0].rule == "is also in data.path, by name, link or content"
    for name in "pq":
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.add_document([1, 2, 3 if name == "p" else 4])  # the indexes are alike
    assert rules(str(tmp_path / "p"), validation_path=str(tmp_path / "q")) == ""
    (tmp_path / "q.bin").write_bytes((tmp_path / "p.bin").read_bytes())
    assert "p.bin" not in rules(str(tmp_path / "p"), validation_path=str(tmp_path / "q"))
    assert "q.bin': is also in" in rules(str(tmp_path / "p"), validation_path=str(tmp_path / "q"))


def test_pipes_devices_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl"))
    for name in ("pipe", "null", "s"):
        assert f"{name}.jsonl': is no regular file. Write what it holds" in rules(
            str(tmp_path / f"{name}.jsonl")
        )
    assert rules(str(tmp_path / "*.jsonl")).count("is no regular file") == 4
    assert "is no regular file" in rules("/dev/stdin")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", lines(RECORDS) + b'{"text": "ab\n', r"a.jsonl:4': is not JSON \(.*\). Correct the line"),
        ("a.jsonl", lines(RECORDS) + b'{"text": "\xff"}\n', r"a.jsonl:4': is not UTF-8"),
        (
            "a.jsonl",
            lines(RECORDS) + b'{"body": "x", "id": 1}',
            r"a.jsonl:4': has no 'text'; it has 'body', 'id'. Set",
        ),
        ("a.jsonl", lines(RECORDS) + b"[1]\n", r"a.jsonl:4': is a JSON list, not an object"),
        (
            "a.jsonl",
            lines(RECORDS) + b'{"text": null}\n',
            r"a.jsonl:4': has a NoneType under 'text', not a text",
        ),
        ("a.jsonl", rb'{"text": "ab\ud83d"}', r"a.jsonl:1': has half a surrogate pair at character 2"),
        ("a.json", b'[{"text": "a"}, {"t": 1}]', r"a.json, record 2': has no 'text'; it has 't'"),
        ("a.json", b'[{"text": "a"}, {', r"a.json': is not JSON"),
        ("a.json", b'{\n  "text": "a"\n}', r"a.json:1': is not JSON .* each must be one JSON object"),
        ("a.txt", b"one\ntwo \xe9\n", r"a.txt:2': is not UTF-8 .* Convert it to UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(random.Random(0).randbytes(99), mtime=0)[:60],
            r"a.jsonl.gz': cannot be read .* Repair",
        ),
        ("a.jsonl.gz", b"not a zip at all", r"a.jsonl.gz': cannot be read \(Not a gzipped file"),
        ("a.jsonl.zst", b"not a zip at all", r"a.jsonl.zst': cannot be read"),
        ("a.parquet", b"PAR1 it is not PAR1", r"a.parquet': is not a whole parquet file"),
        (
            "a.jsonl",
            lines(RECORDS) + b"[" * 100_000,
            r"a.jsonl:4': nests lists .* too deeply .*Correct",
        ),
        ("a.json", b"[" * 100_000, r"a.json': nests lists and objects too deeply"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a.jsonl:1': has an integer of more than"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a.jsonl:1': has the field 'text' twice"),
    ],
)
def test_faults_in_files_are_named(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        texts(str(tmp_path / name))


def test_the_first_record_is_looked_at_early(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n')
    assert "a.jsonl:1': has no 'text'; it has 'body'. Set data.text_key" in rules(str(tmp_path / "a.jsonl"))
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    assert "has no 'text'; it has 'body', 'id'" in rules(str(path))
    assert "has a column 'id' of int64, not of text" in rules(str(path), text_key="id")


def test_records_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb of one line, or of one array, ends after the limit and not with the memory."""
    monkeypatch.setattr(documents, "LARGEST_LINE", 1 << 20)
    monkeypatch.setattr(documents, "LARGEST_WHOLE", 1 << 20)
    bomb = b"a" * (1 << 21)
    for name, raw, said in (
        ("a.jsonl.gz", lines(RECORDS) + b'{"text": "' + bomb, "a.jsonl.gz:4': is a line of more than 1 MiB"),
        ("a.json.gz", b'["' + bomb, "a.json.gz': holds more than 1 MiB that would be read at once. Split"),
        ("a.txt.gz", bomb, "a.txt.gz': holds more than 1 MiB"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(raw))
        with pytest.raises(DataError, match=said):
            texts(str(tmp_path / name))
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "x" * ((1 << 20) - 40), "n": float("nan")}] * 3))
    assert len(texts(str(tmp_path / "b.jsonl"))) == 3


def test_text_columns_of_parquet_in_every_type(tmp_path: Path) -> None:
    import pyarrow as pa

    said = [f"text {i % 3} \u00e9" for i in range(700)]
    plain = pa.array(said)
    columns = {
        "large": pa.array(said, pa.large_string()),
        "view": pa.array(said, pa.string_view()),
        "categories": plain.dictionary_encode(),
        "large_categories": pa.array(said, pa.large_string()).dictionary_encode(),
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    for name in columns:
        assert texts(str(path), text_key=name) == said
    others = {"list": pa.array([[one] for one in said]), "bytes": pa.array([one.encode() for one in said])}
    path = write_parquet(tmp_path / "b.parquet", others)
    for name in others:
        assert f"has a column {name!r} of " in rules(str(path), text_key=name)
        assert "not of text. Write the column as strings" in rules(str(path), text_key=name)
    twice = pa.Table.from_arrays([plain, plain], names=["text", "text"])
    pa.parquet.write_table(twice, tmp_path / "c.parquet")
    assert "has several columns 'text'" in rules(str(tmp_path / "c.parquet"))


def test_null_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y", None]})
    with pytest.raises(DataError, match=r"a.parquet, row 3': has a NoneType"):
        texts(str(path))


def test_token_files_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    for name in ("p", "q"):
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.add_document([1, 2, 3])
    for name in ("p", "p.bin", "p.idx"):
        sources = resolve(DataConfig(path=str(tmp_path / name)))
        assert (sources.kind, sources.files) == ("indexed", (tmp_path / "p",))
    assert "names several tokenised pairs. Merge them" in rules([str(tmp_path / "p"), str(tmp_path / "q")])
    with pytest.raises(DataError, match="is already tokenised"):
        texts(str(tmp_path / "p"))
    (tmp_path / "p.bin").write_bytes(b"12")
    assert "data.path='" in rules(str(tmp_path / "p"))
    assert "holds 2 bytes where its index promises 12" in rules(str(tmp_path / "p"))


def test_fingerprint_follows_what_matters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    base = DataConfig(path=str(path))
    first = fingerprint(base)
    assert len(first) == 64
    assert fingerprint(DataConfig(path=str(path), seq_len=7, seed=3)) == first
    assert fingerprint(DataConfig(path=str(path), append_eos=False)) != first
    assert fingerprint(DataConfig(path=str(path), text_key="body")) != first
    os.utime(path, ns=(1, 1))
    assert fingerprint(base) != first
    assert fingerprint(DataConfig()) == fingerprint(DataConfig())


def test_checking_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    code = (
        "import sys; from recipes.data.config import DataConfig; "
        "from recipes.data.sources import check_paths; import recipes.data.build_data;"
        f"assert check_paths(DataConfig(path={str(tmp_path / '*.jsonl')!r})) == [];"
        "print({'datasets', 'transformers', 'tokenizers', 'megatron', 'pyarrow'} & set(sys.modules))"
    )
    root = ROOT
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
