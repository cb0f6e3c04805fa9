"""From a config to training and validation samples."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError
from recipes.data.build_data import build_data, check_ids, load_data
from recipes.data.config import DataConfig
from recipes.data.indexed import IndexedDataset, IndexedWriter, content_hash
from recipes.data.packing import ORDER_VERSION


def write(prefix: Path, seed: int, documents: int = 200) -> Path:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(rng.integers(0, 300, size=rng.integers(1, 50)))
    return prefix


def test_split_of_one_path(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", 0)
    data = build_data(DataConfig(seq_len=16, validation_fraction=0.1), prefix)
    assert data.train.num_documents + data.validation.num_documents == 200
    total = data.train_tokens + data.validation_tokens
    assert total * 2 == (tmp_path / "p.bin").stat().st_size
    assert 0.08 < data.validation_tokens / total <= 0.1
    assert data.train.batch(5, 3).shape == data.validation.batch(0, 3).shape == (3, 17)


def test_validation_of_its_own(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "t", 0), write(tmp_path / "v", 1, documents=20)
    data = build_data(DataConfig(seq_len=16), train, held_out)
    assert (data.train.num_documents, data.validation.num_documents) == (200, 20)
    stream = np.fromfile(tmp_path / "v.bin", "<u2")
    assert data.validation.sample(1).tolist() == stream[16:33].tolist()
    with pytest.raises(DataError, match=r"1000 \+ 1 tokens"):
        build_data(DataConfig(seq_len=1000), train, held_out)


def test_validation_on_the_same_tokens_is_refused(tmp_path: Path) -> None:
    """Whatever the files are called and however the text was stored: the tokens decide."""
    train, held_out = write(tmp_path / "t", 0), write(tmp_path / "v", 0)
    with pytest.raises(DataError, match="data.validation_path='v': holds the tokens of data.path"):
        build_data(DataConfig(path="t", validation_path="v", seq_len=16), train, held_out)


def test_fingerprint_is_of_the_tokens_and_the_order(tmp_path: Path) -> None:
    prefix, cfg = write(tmp_path / "p", 0), DataConfig(seq_len=16)
    first = build_data(cfg, prefix).fingerprint
    # What it was before there were masks.
    before = [content_hash(IndexedDataset(prefix)), 0.02, 16, 0, ORDER_VERSION]
    crossing = build_data(DataConfig(seq_len=16, document_mask=False), prefix)
    assert crossing.fingerprint == hashlib.sha256(json.dumps(before).encode()).hexdigest() != first
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prefix}{suffix}", tmp_path / "elsewhere" / f"q{suffix}")
    assert build_data(cfg, tmp_path / "elsewhere" / "q").fingerprint == first
    others = [
        build_data(DataConfig(seq_len=8), prefix),
        build_data(DataConfig(seq_len=16, seed=1), prefix),
        build_data(DataConfig(seq_len=16, validation_fraction=0.1), prefix),
        build_data(cfg, write(tmp_path / "r", 1)),
        build_data(cfg, prefix, tmp_path / "r"),
        build_data(cfg, tmp_path / "r", prefix),
    ]
    assert len({first, *(data.fingerprint for data in others)}) == 7


def test_ids_must_fit_the_model(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.int32) as writer:
        writer.add_document([5, 299])
    check_ids(tmp_path / "p", 300)
    with pytest.raises(
        DataError, match="holds ids from 5 to 299, and the model's vocabulary has 299 entries"
    ):
        check_ids(tmp_path / "p", 299)
    with IndexedWriter(tmp_path / "n", np.int32) as writer:
        writer.add_document([-1, 2])
    with pytest.raises(DataError, match="holds ids from -1 to 2"):
        check_ids(tmp_path / "n", 299)


def test_load_data_from_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the quick brown fox\n" * 5)
    cfg = DataConfig(path=str(tmp_path / "*.txt"), seq_len=16, validation_fraction=0.2)
    data = load_data(cfg, tokenizer_dir, tmp_path / "cache", 300, log=lambda _: None)
    assert data.train.sample(0).max() < 300
    again = load_data(cfg, tokenizer_dir, tmp_path / "cache", 300, log=lambda _: None)
    assert again.fingerprint == data.fingerprint
    assert again.train.batch(0, 9).tolist() == data.train.batch(0, 9).tolist()
    with pytest.raises(DataError, match="the model's vocabulary has 50 entries. Tokenise with the tokenizer"):
        load_data(cfg, tokenizer_dir, tmp_path / "cache", 50, log=lambda _: None)
    own = DataConfig(path=str(tmp_path / "1*.txt"), validation_path=str(tmp_path / "2*.txt"), seq_len=16)
    data = load_data(own, tokenizer_dir, tmp_path / "cache", 300, log=lambda _: None)
    assert data.train.num_documents == data.validation.num_documents == 11
