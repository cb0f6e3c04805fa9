"""Packing by hand, against an obvious implementation, and over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError
from recipes.data import packing
from recipes.data.indexed import IndexedDataset, IndexedWriter
from recipes.data.packing import OrderedDataset, PackedDataset, permutation, rank_slice, split_documents


def indexed(folder: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedWriter(folder / "p", np.int32) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return IndexedDataset(folder / "p")


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, size=count)
    tokens = iter(range(int(lengths.sum())))  # every token is unique, so that a place is known by its token
    return [[next(tokens) for _ in range(n)] for n in lengths]


def test_ordered_by_hand(tmp_path: Path) -> None:
    # Stream 1 2 3 4 5 | 6 | 7 8 9 10 11, S = 3: cuts at 0, 3, 6 of four tokens, one shared with the next.
    # 11 tokens give (11 - 1) // 3 = 3 samples; the target 11 is the tail that is left over.
    data = OrderedDataset(indexed(tmp_path, [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11]]), 3, 0, np.arange(3))
    assert (data.samples_per_epoch, data.num_tokens, data.num_documents) == (3, 11, 3)
    expected = [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, 10]]
    assert data.batch(0, 3).tolist() == expected
    assert data.batch(2, 3).tolist() == [expected[2], expected[0], expected[1]]
    assert data.sample(7).dtype == np.int64


def test_ordered_takes_only_its_documents_and_passes_empty_ones(tmp_path: Path) -> None:
    files = indexed(tmp_path, [[1, 2], [], [90], [], [3, 4, 5], []])
    # Documents 4, 1, 0 in this order: 3 4 5 | | 1 2; S = 2: [3 4 5] [5 1 2].
    data = OrderedDataset(files, 2, 0, np.array([4, 1, 0]))
    assert data.batch(0, 2).tolist() == [[3, 4, 5], [5, 1, 2]]


def test_positions_by_hand(tmp_path: Path) -> None:
    # Stream 1 2 3 4 5 | 6 | 7 8 9 10 11, S = 3: inputs 1 2 3, then 4 5 6, then 7 8 9. The second sample
    # begins within a document, and counts from 0 as well.
    files = indexed(tmp_path, [[1, 2, 3, 4, 5], [], [6], [7, 8, 9, 10, 11]])
    data = OrderedDataset(files, 3, 0, np.arange(4), document_mask=True)
    found = data.metadata(0, 3)
    assert found is not None and found.positions_BS is not None
    assert found.positions_BS.tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 2]]
    assert found.weights_BS is None and found.real_BS is None
    assert OrderedDataset(files, 3, 0, np.arange(4)).metadata(0, 3) is None


def test_positions_equal_the_obvious_ones(tmp_path: Path) -> None:
    documents = random_documents(60, 9)
    owner = {token: (i, at) for i, document in enumerate(documents) for at, token in enumerate(document)}
    data = PackedDataset(indexed(tmp_path, documents), 7, 3, np.arange(60), document_mask=True)
    size = 2 * data.samples_per_epoch
    found = data.metadata(0, size)
    assert found is not None and found.positions_BS is not None
    restarts = 0
    for row, positions in zip(data.batch(0, size).tolist(), found.positions_BS.tolist(), strict=True):
        wanted: list[int] = []
        for k, token in enumerate(row[:-1]):
            # Of the same document, one further.
            goes_on = k > 0 and owner[token] == (owner[row[k - 1]][0], owner[row[k - 1]][1] + 1)
            wanted.append(wanted[-1] + 1 if goes_on else 0)
            restarts += k > 0 and not goes_on
        assert positions == wanted
    assert restarts > 30


def test_shuffled_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = {packing._DOCUMENTS: [[2, 0, 1], [1, 2, 0]], packing._SAMPLES: [[1, 0], [0, 1]]}
    monkeypatch.setattr(packing, "permutation", lambda n, seed, what, epoch: np.array(orders[what][epoch]))
    data = PackedDataset(indexed(tmp_path, [[1, 2], [3], [4, 5]]), 2, 0, np.arange(3))
    # Epoch 0: 4 5 | 1 2 | 3, cuts [4 5 1] [1 2 3], the second first. Epoch 1: 3 | 4 5 | 1 2, cuts in order.
    assert data.batch(0, 4).tolist() == [[1, 2, 3], [4, 5, 1], [3, 4, 5], [5, 1, 2]]


@pytest.mark.parametrize(("count", "longest", "seq_len"), [(40, 9, 4), (7, 60, 5), (100, 3, 16), (1, 30, 1)])
def test_equals_the_obvious_implementation(tmp_path: Path, count: int, longest: int, seq_len: int) -> None:
    documents = [*random_documents(count, longest), [10**6 + i for i in range(seq_len + 1)]]
    ids = np.array([i for i in range(len(documents)) if i % 5 != 3])
    data = PackedDataset(indexed(tmp_path, documents), seq_len, 11, ids)
    for epoch in range(3):
        order = ids[permutation(len(ids), 11, packing._DOCUMENTS, epoch)]
        stream = [token for i in order for token in documents[i]]
        cuts = [stream[k : k + seq_len + 1] for k in range(0, len(stream) - seq_len, seq_len)]
        assert len(cuts) == data.samples_per_epoch
        places = permutation(len(cuts), 11, packing._SAMPLES, epoch)
        expected = [cuts[place] for place in places]
        assert data.batch(epoch * len(cuts), len(cuts)).tolist() == expected


def test_pure_in_seed_and_number(tmp_path: Path) -> None:
    files = indexed(tmp_path, random_documents(50, 20))
    make = lambda seed: PackedDataset(files, 8, seed, np.arange(50))  # noqa: E731
    data, total = make(3), 4 * make(3).samples_per_epoch
    forward = [data.sample(n).tolist() for n in range(total)]
    numbers = np.random.default_rng(0).permutation(total)
    assert all(data.sample(int(n)).tolist() == forward[n] for n in numbers)
    assert all(make(3).sample(int(n)).tolist() == forward[n] for n in numbers[:5])
    assert len(data._epochs) <= packing.EPOCHS_KEPT
    n = data.samples_per_epoch
    assert forward[:n] != forward[n : 2 * n], "epochs must differ in order"
    assert make(4).batch(0, n).tolist() != forward[:n], "seeds must differ in order"


def test_every_token_once_an_epoch(tmp_path: Path) -> None:
    data = PackedDataset(indexed(tmp_path, random_documents(30, 20)), 8, 0, np.arange(30))
    targets = data.batch(0, data.samples_per_epoch)[:, 1:].ravel()
    assert len(set(targets.tolist())) == targets.size == data.samples_per_epoch * 8
    assert data.num_tokens - 1 - targets.size < 8


def test_order_is_the_same_for_ever() -> None:
    # Recorded: a change breaks the resumption of every run, and needs a new ORDER_VERSION.
    assert permutation(8, seed=5, purpose=1, epoch=2).tolist() == [4, 3, 2, 0, 5, 7, 6, 1]
    assert sorted(permutation(1000, 0, 0).tolist()) == list(range(1000))


def test_samples_of_a_step_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    data = PackedDataset(indexed(tmp_path, random_documents(60, 30)), 6, 0, np.arange(60))
    global_batch, steps = 8, 5
    seen = {}
    for world, micro in ((1, 8), (1, 2), (2, 2), (4, 1), (8, 1), (2, 4)):
        accumulation = global_batch // (world * micro)
        seen[world, micro] = [
            np.concatenate(
                [
                    data.batch(*rank_slice(step * global_batch, a, micro, rank, world))
                    for a in range(accumulation)
                    for rank in range(world)
                ]
            ).tolist()
            for step in range(steps)
        ]
    assert all(batches == seen[1, 8] for batches in seen.values())


def test_rank_slice_by_hand() -> None:
    # Step at 100, 4 ranks of 2: micro-batch 1 takes 108 .. 115, and rank 3 of these 114 and 115.
    assert rank_slice(100, micro_index=1, micro_batch_size=2, rank=3, world=4) == (114, 2)
    with pytest.raises(AssertionError, match="rank 4 of 4"):
        rank_slice(0, 0, 1, 4, 4)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_split_is_a_partition_of_about_that_share(fraction: float) -> None:
    lengths = np.random.default_rng(1).integers(1, 100, size=2000)
    train, validation = split_documents(lengths, fraction, seed=7, seq_len=10)
    assert sorted([*train, *validation]) == list(range(2000))
    share = lengths[validation].sum() / lengths.sum()
    assert fraction - 100 / lengths.sum() <= share <= fraction
    again = split_documents(lengths, fraction, seed=7, seq_len=10)
    assert np.array_equal(again[1], validation)
    assert not np.array_equal(split_documents(lengths, fraction, seed=8, seq_len=10)[1], validation)


def test_split_leaves_giants_in_training() -> None:
    lengths = np.array([10000, 20, 20, 20, 20, 20])
    train, validation = split_documents(lengths, 0.005, seed=0, seq_len=16)
    assert 0 in train
    assert len(validation) == 2  # 0.005 * 10100 = 50.5 tokens: two of twenty
    train, validation = split_documents(np.array([50, 40, 60]), 0.01, seed=0, seq_len=16)
    assert validation.tolist() == [1]  # all are longer than 1.5 tokens: the shortest


def test_empty_documents_do_not_fill_the_validation_split() -> None:
    # Both of 400 are longer than a fifth of 800; the empty ones fit, and are nothing to validate on.
    train, validation = split_documents(np.array([0, 400, 0, 0, 400, 0]), 0.2, seed=0, seq_len=16)
    assert len(validation) == 1
    assert validation[0] in (1, 4)
    assert sorted([*train, *validation]) == list(range(6))
    with pytest.raises(DataError, match="1 documents.*cannot be split"):
        split_documents(np.array([0, 400, 0]), 0.2, 0, 16)


def test_split_messages() -> None:
    with pytest.raises(DataError, match="1 documents.*cannot be split.*validation_path"):
        split_documents(np.array([1000]), 0.1, 0, 8)
    with pytest.raises(
        DataError, match=r"fraction=0.1: for validation, 1 documents of 5 tokens .* 8 \+ 1 tokens"
    ):
        split_documents(np.array([1000, 5]), 0.1, 0, 8)
    with pytest.raises(DataError, match="for training, .* Give more documents, a smaller data.seq_len"):
        split_documents(np.array([5, 95]), 0.96, 0, 8)


def test_too_few_tokens_for_a_sample(tmp_path: Path) -> None:
    files = indexed(tmp_path, [[1, 2], [3, 4]])
    with pytest.raises(DataError, match=r"seq_len=4: 2 documents of 4 tokens .* one sample of 4 \+ 1 tokens"):
        PackedDataset(files, 4, 0, np.arange(2))
    assert PackedDataset(files, 3, 0, np.arange(2)).samples_per_epoch == 1
    with pytest.raises(DataError, match="0 documents of 0 tokens"):
        PackedDataset(files, 3, 0, np.arange(0))
