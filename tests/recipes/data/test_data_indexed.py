"""Token files, against Megatron's own reader and builder as the oracle."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, DiskError
from recipes.data import indexed as module
from recipes.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from tests.paths import ROOT

DOCUMENTS = [[1, 2, 3], [4], [], [65000, 6, 7, 8, 9]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: object = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return prefix


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_same_bytes_as_megatron_builder(tmp_path: Path, megatron, dtype: type) -> None:
    import torch

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100, size=n).tolist() for n in (5, 1, 0, 33, 2)]
    write(tmp_path / "ours", documents, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_ours(tmp_path: Path, megatron) -> None:
    theirs = megatron.IndexedDataset(str(write(tmp_path / "ours")))
    assert len(theirs) == len(DOCUMENTS)
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.index.dtype == np.uint16


@pytest.mark.parametrize("multimodal", [False, True])
def test_we_read_documents_of_several_sequences(tmp_path: Path, megatron, multimodal: bool) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "f.bin"), dtype=np.int32, multimodal=multimodal)
    modes = {"modes": [0, 1]} if multimodal else {}
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3], **modes)
    builder.add_document(np.array([70000]), [1], **({"modes": [0]} if multimodal else {}))
    builder.end_document()  # a document of no sequence at all
    builder.add_document(np.array([8, 9]), [1, 1], **modes)
    builder.finalize(str(tmp_path / "f.idx"))
    ours = IndexedDataset(tmp_path / "f")
    assert ours.num_documents == 4
    assert [ours.document(i).tolist() for i in range(4)] == [[1, 2, 3, 4, 5], [70000], [], [8, 9]]


@pytest.mark.parametrize("size", [1, 256, 65499, 65500, 65501, 65536, 200000])
def test_token_type_is_megatrons_choice(megatron, size: int) -> None:
    assert token_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


def test_reading_back(tmp_path: Path) -> None:
    ours = IndexedDataset(write(tmp_path / "with.dots" / "a.b"))
    assert (ours.num_documents, ours.num_tokens, ours.dtype) == (4, 9, np.dtype("<u2"))
    assert ours.document_lengths.tolist() == [3, 1, 0, 5]
    assert [ours.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert ours.tokens(2, 5).tolist() == [3, 4, 65000]
    assert ours.gather(np.array([8, 0, 4])).tolist() == [9, 1, 65000]
    assert ours.token_range() == (1, 65000)
    with pytest.raises(ValueError, match="read-only"):
        ours.document(0)[0] = 5


def test_many_at_once_equals_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "one")
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3, 4]), [3, 1])
        writer.add_documents([65000, 6, 7, 8, 9], [0, 5])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_no_documents_at_all(tmp_path: Path) -> None:
    ours = IndexedDataset(write(tmp_path / "none", []))
    assert (ours.num_documents, ours.num_tokens, ours.token_range()) == (0, 0, (0, 0))


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCAN_BLOCKS", 2)
    monkeypatch.setattr(module, "SCAN_BLOCK_TOKENS", 4)
    # Blocks of four: [0 1 2 3] [4 .. 7] [8 .. 11] [12]; the first and the last are read.
    ours = IndexedDataset(write(tmp_path / "big", [list(range(3, 16))]))
    assert ours.token_range() == (3, 15)
    ours = IndexedDataset(write(tmp_path / "hidden", [[1, 1, 1, 1, 999, 1, 1, 1, 1]]))
    assert ours.token_range() == (1, 1)


def test_ids_that_do_not_fit_are_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ids 0 to 65536 do not fit in uint16"):
        write(tmp_path / "x", [[0, 65536]])
    assert files(tmp_path) == []


def corrupt_idx(offset: int, value: bytes):
    def change(prefix: Path) -> None:
        raw = bytearray(Path(f"{prefix}.idx").read_bytes())
        raw[offset : offset + len(value)] = value
        Path(f"{prefix}.idx").write_bytes(raw)

    return change


def truncate(suffix: str, drop: int):
    def change(prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:-drop])

    return change


# Four sequences: header 0..34, lengths 34..50, pointers 50..82, boundaries 82..122.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: Path(f"{p}.bin").unlink(), r"p\.bin.* does not exist"),
        (lambda p: Path(f"{p}.idx").unlink(), r"p\.idx.* does not exist"),
        (truncate(".bin", 2), r"p\.bin.*holds 16 bytes where its index promises 18"),
        (truncate(".idx", 1), r"p\.idx.*holds 121 bytes where its header promises 122"),
        (truncate(".idx", 100), r"p\.idx.*ends within its header, after 22 bytes"),
        (truncate(".idx", 122), r"p\.idx.*begins with b'', not as a Megatron index"),
        (
            lambda p: Path(f"{p}.idx").write_bytes(b"PAR1" * 99),
            r"p\.idx.*begins with b'PAR1.*not as a Megatron",
        ),
        (corrupt_idx(9, struct.pack("<Q", 2)), r"p\.idx.*version 2 of the format, and only 1 is known"),
        (corrupt_idx(17, b"\x07"), r"p\.idx.*token type 7, which is no integer type"),
        (corrupt_idx(17, b"\x63"), r"p\.idx.*token type 99, which is no integer type"),
        (corrupt_idx(18, struct.pack("<Q", 2**40)), r"p\.idx.*header promises"),
        (corrupt_idx(34, struct.pack("<i", -3)), r"p\.idx.*lengths that make no sense"),
        (corrupt_idx(50, struct.pack("<q", 8)), r"p\.idx.*sequences that do not lie one after another"),
        (corrupt_idx(114, struct.pack("<q", 3)), r"p\.idx.*boundaries or lengths that make no sense"),
        (  # differences that wrap around are all positive
            corrupt_idx(90, struct.pack("<3q", 2**63 - 1, -(2**63), -1)),
            r"p\.idx.*boundaries or lengths that make no sense",
        ),
        (corrupt_idx(90, struct.pack("<q", 9)), r"p\.idx.*boundaries or lengths that make no sense"),
    ],
)
def test_damaged_or_foreign_files_are_named(tmp_path: Path, change, message: str) -> None:
    change(write(tmp_path / "p"))
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "p")


def test_an_exception_removes_everything(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_document([1, 2])
        raise RuntimeError("stop")
    assert files(tmp_path) == []


@pytest.mark.parametrize("before", [False, True])
def test_killed_midway_leaves_no_pair(tmp_path: Path, before: bool) -> None:
    """Killed while writing, and between the two renames; also over an older pair."""
    if before:
        write(tmp_path / "x", [[7, 7]])
    script = """
        import os, signal, sys
        from recipes.data import indexed
        rename = os.replace
        def die(source, target):
            if str(target).endswith(".idx"):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = die
        with indexed.IndexedWriter(sys.argv[1], "int32") as writer:
            writer.add_document(range(100000))
            if sys.argv[2] == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
    """
    root = ROOT
    for moment in ("writing", "renaming"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x"), moment]
        result = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
        assert result.returncode == -signal.SIGKILL
        if before and moment == "writing":
            assert IndexedDataset(tmp_path / "x").tokens(0, 2).tolist() == [7, 7]
        else:
            with pytest.raises(DataError, match="does not exist"):
                IndexedDataset(tmp_path / "x")
    write(tmp_path / "x", [[5]])
    assert IndexedDataset(tmp_path / "x").document(0).tolist() == [5]


def test_replaces_an_earlier_pair(tmp_path: Path) -> None:
    write(tmp_path / "x", [[7, 7]])
    write(tmp_path / "x")
    assert IndexedDataset(tmp_path / "x").num_tokens == 9
    assert files(tmp_path) == ["x.bin", "x.idx"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_a_sentence(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", np.int32)
    with pytest.raises(DiskError, match=r"x\.bin.*No space left.*could not be written. Free some"), writer:
        assert writer._stream is not None
        writer._stream.close()
        writer._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the writer closes it
        writer.add_document(range(100))
    assert files(tmp_path) == []
