"""Conversations packed into samples: by hand, as invariants, and from files to samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError
from recipes.data.build_data import TrainData, load_data
from recipes.data.chat_samples import ChatSamples, cut, pack
from recipes.data.chat_tokens import ensure_chat_tokens
from recipes.data.config import DataConfig
from tests.recipes.data.chat_cases import (
    BOS,
    BOT,
    END,
    PLAIN,
    USER,
    A,
    B,
    C,
    D,
    save_tokenizer,
    talk,
    write_rows,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of whole words."""
    return save_tokenizer(tmp_path_factory.mktemp("words"), PLAIN)


def make(folder: Path, words: Path, rows: list[dict], seq_len: int, shuffled: bool = False) -> ChatSamples:
    """All conversations of some rows."""
    cfg = DataConfig(path=write_rows(folder / "r.jsonl", rows), format="chat", seq_len=seq_len)
    chat = ensure_chat_tokens(cfg, words, folder / "cache", log=lambda _: None)
    found = cut(chat, seq_len)
    return ChatSamples(chat, seq_len, 0, found.kept, found.lengths, shuffled=shuffled)


def test_packing_by_hand() -> None:
    # Room 10, longest first: 7 opens sample 0 (3 left), 6 sample 1 (4 left), 5 sample 2 (5 left), 4 goes
    # where it leaves 0 (sample 1), 3 likewise (sample 0), 3 into sample 2 (2 left), 2 there too (0 left).
    lengths = np.array([3, 6, 2, 7, 5, 4, 3])
    assert pack(lengths, 10) == [[3, 0], [1, 5], [4, 6, 2]]
    assert pack(np.array([10]), 10) == [[0]]


def test_packing_fills_and_keeps_everything() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    samples = pack(lengths, 64)
    assert sorted(i for sample in samples for i in sample) == list(range(2000))
    sums = [int(lengths[sample].sum()) for sample in samples]
    assert max(sums) <= 64
    assert sum(sums) / (64 * len(samples)) > 0.98


def test_a_sample_by_hand(tmp_path: Path, words: Path) -> None:
    # <s> <user> a <end> <bot> b <end> and the same with c, d: 7 tokens each; samples of 15 + 1.
    data = make(tmp_path, words, [talk("user: a", "bot: b"), talk("user: c", "bot: d")], 15)
    assert (data.samples_per_epoch, data.num_documents, data.num_tokens) == (1, 2, 14)
    one = [BOS, USER, A, END, BOT, B, END, BOS, USER, C, END, BOT, D, END, 0, 0]
    assert data.sample(0).tolist() == one
    assert data.batch(0, 2).tolist() == [one, one]
    metadata = data.metadata(0, 1)
    # Target t is token t + 1: b and <end> are tokens 5, 6; d and <end> are 12, 13.
    assert metadata.weights_BS.nonzero()[:, 1].tolist() == [4, 5, 11, 12]
    assert metadata.real_BS.long().tolist() == [[1] * 14 + [0]]
    assert metadata.positions_BS is not None
    assert metadata.positions_BS.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]]
    assert data.num_counted(0, 1) == 4
    assert data.num_counted(0, 3) == 12


def test_a_conversation_that_fills_a_sample(tmp_path: Path, words: Path) -> None:
    data = make(tmp_path, words, [talk("user: a", "bot: b")], 6)
    assert data.sample(0).tolist() == [BOS, USER, A, END, BOT, B, END]
    metadata = data.metadata(0, 1)
    assert metadata.weights_BS.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert bool(metadata.real_BS.all())


def test_long_ones_are_cut_and_those_without_a_reply_left_out(tmp_path: Path, words: Path) -> None:
    rows = [talk("user: a", "bot: b c d a b"), talk("user: a b c d a b", "bot: a"), talk("user: a", "bot: d")]
    cfg = DataConfig(path=write_rows(tmp_path / "r.jsonl", rows), format="chat", seq_len=7)
    found = cut(ensure_chat_tokens(cfg, words, tmp_path / "cache", log=lambda _: None), 7)
    # 11 tokens cut to 8, which holds b c d; 12 cut to 8, before the reply; 7 stay.
    assert (found.longer, found.dropped, found.lost) == (2, 1, 7)
    assert (found.kept.tolist(), found.lengths.tolist()) == ([0, 2], [8, 7])
    said: list[str] = []
    load_data(replace(cfg, validation_fraction=0.5), words, tmp_path / "cache", 12, said.append)
    assert any("2 conversations are longer than data.seq_len + 1 = 8 tokens: 7 tokens" in s for s in said)
    with pytest.raises(
        DataError, match=r"seq_len=3: no conversation has a reply within 3 \+ 1 tokens. Raise"
    ):
        load_data(replace(cfg, seq_len=3), words, tmp_path / "cache", 12, said.append)


def test_order_is_a_function_of_the_number(tmp_path: Path, words: Path) -> None:
    rows = [talk(f"user: {'a ' * (i % 5)}b", f"bot: {'c ' * (i % 3)}d") for i in range(40)]
    data = make(tmp_path, words, rows, 24, shuffled=True)
    again = make(tmp_path, words, rows, 24, shuffled=True)
    size = data.samples_per_epoch
    every = data.batch(0, 3 * size)
    backwards = np.stack([again.sample(n) for n in reversed(range(3 * size))])[::-1]
    assert np.array_equal(every, backwards)
    epochs = [every[i * size : (i + 1) * size].tolist() for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]
    counted = [data.num_counted(n, 1) for n in range(size)]
    assert len(set(counted)) > 1
    assert sum(counted) == data.num_counted(0, size)
    assert counted == [int(data.metadata(n, 1).weights_BS.sum()) for n in range(size)]
    # Every conversation is whole: it begins with <s> and ends with <end>.
    for row in every[:size]:
        used = np.trim_zeros(row, "b")
        assert used[0] == BOS
        assert used[-1] == END


def load(cfg: DataConfig, words: Path, folder: Path) -> tuple[TrainData, list[str]]:
    """Data and what was said."""
    said: list[str] = []
    return load_data(cfg, words, folder / "cache", 12, said.append), said


def test_load_data_splits_caches_and_knows_what_it_is(tmp_path: Path, words: Path) -> None:
    rows = [talk(f"user: {'a ' * (i % 5)}b", f"bot: {'c ' * (i % 3)}d") for i in range(60)]
    rows.append(talk("user: a"))
    path = write_rows(tmp_path / "r.jsonl", rows)
    cfg = DataConfig(path=path, format="chat", seq_len=24, validation_fraction=0.2)
    data, said = load(cfg, words, tmp_path)
    assert data.train.num_documents + data.validation.num_documents == 60
    assert 0.1 < data.validation.num_tokens / (data.train.num_tokens + data.validation.num_tokens) <= 0.2
    assert "(1 without a reply that counts left out)" in said[0]
    again, said = load(cfg, words, tmp_path)
    assert said[0].startswith("data: using the tokens cached in")
    assert again.fingerprint == data.fingerprint
    assert again.train.batch(3, 9).tolist() == data.train.batch(3, 9).tolist()
    assert (
        data.validation.batch(0, 2).tolist()
        == data.validation.batch(data.validation.samples_per_epoch, 2).tolist()
    )
    other = tmp_path / "other.jinja"
    other.write_text(PLAIN.replace("<sys>", "<user>"))
    for change in ({"seed": 1}, {"seq_len": 25}, {"validation_fraction": 0.3}):
        assert load(replace(cfg, **change), words, tmp_path)[0].fingerprint != data.fingerprint
    _, said = load(replace(cfg, chat_template=str(other)), words, tmp_path)
    assert "tokenised" in said[0]
    own = replace(cfg, validation_path=write_rows(tmp_path / "v.jsonl", rows[:7]))
    data, _ = load(own, words, tmp_path)
    assert (data.train.num_documents, data.validation.num_documents) == (60, 7)


def test_what_gives_no_samples(tmp_path: Path, words: Path) -> None:
    cfg = DataConfig(path=write_rows(tmp_path / "r.jsonl", [talk("user: a")] * 3), format="chat")
    with pytest.raises(DataError, match="holds 3 conversations, none with a reply"):
        load(cfg, words, tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    cfg = DataConfig(path=write_rows(tmp_path / "r.jsonl", [talk("user: a", "bot: b")] * 3), format="chat")
    with pytest.raises(DataError, match="ids from 1 to 7, and the model's vocabulary has 5 entries"):
        load_data(cfg, words, tmp_path / "cache", 5, lambda line: None)
