"""Blends by hand, against Megatron's shares, and from configs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, FieldError
from recipes.data import blend as blending
from recipes.data.blend import BLOCK, BlendedSamples, counts
from recipes.data.build_data import TrainData, blend, build_data, load_data
from recipes.data.config import BlendConfig, DataConfig
from recipes.data.indexed import IndexedDataset, IndexedWriter
from recipes.data.packing import PackedDataset
from recipes.data.sources import check_paths, read_documents
from recipes.jobs.blend_use import foresee_blend
from tests.grid import each


def packed(folder: Path, first: int, documents: int = 40) -> PackedDataset:
    """Documents of ten tokens, which say where they come from, in samples of 4 + 1."""
    with IndexedWriter(folder / f"from{first}", np.int32) as writer:
        for i in range(documents):
            writer.add_document(np.arange(first + 10 * i, first + 10 * i + 10))
    files = IndexedDataset(folder / f"from{first}")
    return PackedDataset(files, 4, 0, np.arange(documents), document_mask=True)


def of(*weights: float) -> DataConfig:
    return DataConfig(blend=[BlendConfig(path=f"{i}.txt", weight=w) for i, w in enumerate(weights)])


def test_a_block_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of five samples, shares 3/10 and 7/10: bounds at 1.5 and 3 round to 2 and 3: the first source
    # has two samples of the first block, and one of the second.
    monkeypatch.setattr(blending, "BLOCK", 5)
    orders = [[4, 0, 1, 2, 3], [1, 2, 0, 3, 4]]
    monkeypatch.setattr(blending, "permutation", lambda n, seed, what, block: np.array(orders[block]))
    first, second = packed(tmp_path, 0), packed(tmp_path, 10_000)
    data = BlendedSamples([first, second], [Fraction(3, 10), Fraction(7, 10)], 0)
    assert [data.place(n) for n in range(5)] == [(1, 0), (0, 0), (0, 1), (1, 1), (1, 2)]
    assert [data.place(n) for n in range(5, 10)] == [(1, 3), (1, 4), (0, 2), (1, 5), (1, 6)]
    assert data.drawn(0, 10).tolist() == [3, 7]
    assert data.drawn(1, 6).tolist() == [2, 4]
    wanted = [second.sample(0), first.sample(0), first.sample(1)]
    assert data.batch(0, 3).tolist() == [row.tolist() for row in wanted]
    found, own = data.metadata(1, 2), first.metadata(0, 2)
    assert found is not None and own is not None
    assert found.positions_BS is not None and own.positions_BS is not None
    assert found.positions_BS.tolist() == own.positions_BS.tolist()
    assert (data.num_documents, data.num_tokens, data.num_counted(0, 3)) == (80, 800, 12)


@each(
    "weights", [(0.7, 0.3), (1.0, 1.0, 1.0), (0.5, 0.001, 0.499), (6.1, 3.3, 0.5, 0.1), (1.0, 4095.0), (2.0,)]
)
def test_shares_are_those_of_megatron(weights: tuple[float, ...]) -> None:
    """Its `BlendedDataset` gives each sample to the source that is furthest below its weight."""
    from megatron.core.datasets import helpers_cpp

    size, shares = 3 * BLOCK + 1000, of(*weights).shares
    theirs, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    normalised = np.array(weights) / sum(weights)
    helpers_cpp.build_blending_indices(theirs, numbers, normalised, len(weights), size, False)
    data = BlendedSamples([_Endless()] * len(weights), shares, 5)  # type: ignore[list-item]
    ours = np.array([data.place(n) for n in range(size)])
    for n in (*range(BLOCK, size, BLOCK), size, 999):
        apart = np.abs(
            np.bincount(ours[:n, 0], minlength=len(weights)) - np.bincount(theirs[:n], minlength=len(weights))
        )
        # Both are within one sample of the share at the end of a block; inside, ours are in random order.
        assert apart.max() <= (2 if n % BLOCK == 0 else BLOCK), n
        assert data.drawn(0, n).tolist() == np.bincount(ours[:n, 0], minlength=len(weights)).tolist()
    for source in range(len(weights)):
        own = ours[ours[:, 0] == source, 1]
        assert own.tolist() == list(range(len(own))), "a source's samples come in its order"


class _Endless:
    """A source of which only the numbers matter."""

    seq_len, num_documents, num_tokens, samples_per_epoch = 4, 1, 5, 1


def test_no_source_is_ever_off_by_a_sample() -> None:
    shares = of(0.3, 0.30001, 0.0003, 0.39969).shares
    for blocks in (1, 2, 7, 1000, 10**6, 10**9):
        found = counts(shares, blocks * BLOCK)
        assert found.sum() == blocks * BLOCK
        assert all(abs(int(n) - share * blocks * BLOCK) <= 1 for n, share in zip(found, shares, strict=True))
    small = [counts(shares, n * BLOCK)[2] for n in range(4000)]
    assert small == sorted(small), "its number never falls"


def test_random_access_is_the_same_as_in_order(tmp_path: Path) -> None:
    sources = [packed(tmp_path, 0), packed(tmp_path, 10_000, 10)]
    make = lambda seed: BlendedSamples(sources, of(3, 1).shares, seed)  # noqa: E731
    size = BLOCK + 50
    forward = [make(3).place(n) for n in (0, 17, BLOCK - 1, BLOCK, size)]
    data = make(3)
    assert [data.place(n) for n in (size, BLOCK, BLOCK - 1, 17, 0)] == forward[::-1]
    assert [make(4).place(n) for n in range(20)] != [make(3).place(n) for n in range(20)]


def test_what_a_blend_says_of_itself(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="path='a': is given beside data.blend"):
        replace(of(1.0), path="a")
    with pytest.raises(FieldError, match="is given beside data.blend. Give it in the entries"):
        replace(of(1.0), validation_path="a")
    with pytest.raises(FieldError, match="a blend is of text"):
        replace(of(1.0), format="chat")
    with pytest.raises(FieldError, match="has a name twice"):
        DataConfig(
            blend=[BlendConfig(path="a", weight=1, name="n"), BlendConfig(path="b", weight=1, name="n")]
        )
    with pytest.raises(FieldError, match=r"has a share of 1.0e-04, and the smallest that is kept is 1/4096"):
        of(1, 0.0001)
    with pytest.raises(FieldError, match="weight=0: must be positive"):
        BlendConfig(path="a", weight=0)
    with pytest.raises(FieldError, match="is no name of a metric"):
        BlendConfig(path="a", weight=1, name="a/b")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    entries = [BlendConfig(path=str(tmp_path / "a.txt"), weight=1, validation_path=str(tmp_path / "b.txt"))]
    entries.append(BlendConfig(path=str(tmp_path / "[b].txt"), weight=1))
    [mistake] = check_paths(DataConfig(blend=entries))
    assert (mistake.path, mistake.value) == ("data.blend[0].validation_path", str(tmp_path / "b.txt"))
    [mistake] = check_paths(DataConfig(blend=[replace(entries[0], path=str(tmp_path / "c.txt"))]))
    assert mistake.path == "data.blend[0].path"
    texts = [each.text for each in read_documents(DataConfig(blend=entries), print)]
    assert texts == ["text of a", "text of b"]


def parts(folder: Path, cfg: DataConfig) -> TrainData:
    """A blend of two pairs of token files."""
    for i in (0, 1):
        if not (folder / f"{i}.bin").exists():
            draw = np.random.default_rng(i)
            with IndexedWriter(folder / str(i), np.uint16) as writer:
                for _ in range(60):
                    writer.add_document(draw.integers(0, 300, size=draw.integers(5, 40)))
    return blend(cfg, [build_data(own, folder / str(i)) for i, own in enumerate(cfg.sources())])


def test_the_fingerprint_is_of_sources_and_shares(tmp_path: Path) -> None:
    cfg = replace(of(0.7, 0.3), seq_len=8, validation_fraction=0.2)
    first = parts(tmp_path, cfg).fingerprint
    assert parts(tmp_path, replace(of(7, 3), seq_len=8, validation_fraction=0.2)).fingerprint == first
    others = [
        replace(of(6, 3), seq_len=8, validation_fraction=0.2),
        replace(cfg, seed=1),
        replace(cfg, document_mask=False),
    ]
    assert len({first, *(parts(tmp_path, other).fingerprint for other in others)}) == 4
    data = parts(tmp_path, cfg)
    assert [source.name for source in data.sources] == ["source1", "source2"]
    assert data.files == tuple(tmp_path / f"{i}.{kind}" for i in (0, 1) for kind in ("bin", "idx"))


def test_a_source_that_is_too_small_is_refused(tmp_path: Path) -> None:
    cfg = replace(of(0.7, 0.3), seq_len=8, validation_fraction=0.2)
    data = parts(tmp_path, cfg)
    first, second = (source.train.samples_per_epoch for source in data.sources)
    drawn = data.train.drawn(0, 400)  # type: ignore[attr-defined]
    lines = foresee_blend(data, 400)
    assert f"{drawn[0] / first:.2f} epochs" in lines[0] and "30.00% of the samples" in lines[1]
    limited = replace(cfg, blend=[replace(cfg.blend[0]), replace(cfg.blend[1], max_epochs=1.5)])
    enough = int(1.5 * second / 0.3) - 100
    assert len(foresee_blend(parts(tmp_path, limited), enough)) == 2
    with pytest.raises(
        DataError, match=r"data.blend\[1\].max_epochs=1.5: the run takes .* epochs of source2: "
    ):
        foresee_blend(parts(tmp_path, limited), 3 * enough + 1000)


def test_a_blend_of_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    for i in range(24):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the quick brown fox\n" * 5)
    entries = [
        BlendConfig(path=str(tmp_path / "1*.txt"), weight=3, name="ones"),
        BlendConfig(path=str(tmp_path / "[2-9].txt"), weight=1, validation_path=str(tmp_path / "2?.txt")),
    ]
    cfg = DataConfig(blend=entries, seq_len=16, validation_fraction=0.2)
    data = load_data(cfg, tokenizer_dir, tmp_path / "cache", 300, log=lambda _: None)
    assert [source.share for source in data.sources] == [Fraction(3, 4), Fraction(1, 4)]
    assert data.sources[1].validation.num_documents == 4
    alone = load_data(cfg.sources()[1], tokenizer_dir, tmp_path / "cache", 300, log=lambda _: None)
    n = next(n for n in range(99) if data.train.place(n) == (1, 0))  # type: ignore[attr-defined]
    assert data.train.sample(n).tolist() == alone.train.sample(0).tolist()
