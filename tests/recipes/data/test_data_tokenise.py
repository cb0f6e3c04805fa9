"""Tokenising, its cache, and whether a tokenizer fits."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, DiskError
from recipes.data import cache
from recipes.data import tokenise as module
from recipes.data.bpe import train_byte_level_bpe
from recipes.data.build_data import check_ids
from recipes.data.config import DataConfig
from recipes.data.indexed import IndexedDataset, IndexedWriter
from recipes.data.tokenise import ensure_tokenised, read_counts, tokenise
from recipes.data.tokenizer import check_tokenizer, first_tokens, load_tokenizer, tokenizer_fingerprint
from tests.forked_commands import run_code
from tests.grid import each

TEXTS = ["hello world", "", "caf\u00e9 \u4f60\u597d\n", "def f(x): return x"]


@pytest.fixture
def texts_cfg(tmp_path: Path) -> DataConfig:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(path=str(path))


def edited(source: Path, target: Path, name: str, change) -> Path:
    """A copy of a tokenizer folder with one JSON file changed."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("append_eos", [True, False])
def test_tokens_are_the_tokenizers(texts_cfg, tokenizer_dir, tmp_path, append_eos: bool) -> None:
    cfg = DataConfig(path=texts_cfg.path, append_eos=append_eos)
    counts = tokenise(cfg, tokenizer_dir, tmp_path / "out" / "tokens")
    tokenizer = load_tokenizer(tokenizer_dir, append_eos)
    expected = [tokenizer.encode(t, add_special_tokens=False) + [0] * append_eos for t in TEXTS if t]
    indexed = IndexedDataset(tmp_path / "out" / "tokens")
    assert [indexed.document(i).tolist() for i in range(indexed.num_documents)] == expected
    assert indexed.dtype == np.dtype("<u2")
    assert (counts.documents, counts.empty_documents, counts.tokens) == (3, 1, sum(map(len, expected)))
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert counts.max_token_id == max(max(ids) for ids in expected)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert decoded == [text for text in TEXTS if text]


def test_batches_do_not_matter(texts_cfg, tokenizer_dir, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise(texts_cfg, tokenizer_dir, tmp_path / "whole")
    for name, value in (("BATCH_DOCUMENTS", 1), ("BATCH_CHARACTERS", 12)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            tokenise(texts_cfg, tokenizer_dir, tmp_path / name)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / (name + suffix)).read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_progress_is_plain_lines_without_a_terminal(
    texts_cfg, tokenizer_dir, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes.runtime import progress

    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    said: list[str] = []
    tokenise(texts_cfg, tokenizer_dir, tmp_path / "out", said.append)
    assert len(said) == 1
    assert said[0].startswith("tokenise: 100 %, 4 documents, ")


def test_nothing_but_empty_documents(tokenizer_dir, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text. Name documents"):
        tokenise(DataConfig(path=str(tmp_path / "a.jsonl")), tokenizer_dir, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_fault_midway_leaves_neither_files_nor_cache(
    texts_cfg, tokenizer_dir, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    with open(texts_cfg.path, "a") as stream:
        stream.write('{"text": 5}\n')
    with pytest.raises(DataError, match="texts.jsonl:5': has a int under 'text'"):
        ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_end_token_is_demanded_only_when_appended(texts_cfg, tokenizer_dir, tmp_path) -> None:
    bare = edited(tokenizer_dir, tmp_path / "bare", "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(
        DataError, match="bare.*no end-of-sequence token. Set eos_token .* data.append_eos=false"
    ):
        tokenise(texts_cfg, bare, tmp_path / "out")
    tokenise(DataConfig(path=texts_cfg.path, append_eos=False), bare, tmp_path / "out")


def test_cache_is_used_again_and_follows_its_key(texts_cfg, tokenizer_dir, tmp_path) -> None:
    said: list[str] = []
    ensure = lambda cfg, folder: ensure_tokenised(cfg, folder, tmp_path / "cache", said.append)  # noqa: E731
    prefix = ensure(texts_cfg, tokenizer_dir)
    assert "tokenised 3 documents" in said[-1]
    counts = read_counts(prefix)
    assert counts is not None
    assert counts.tokens == IndexedDataset(prefix).num_tokens
    moved = shutil.copytree(tokenizer_dir, tmp_path / "moved")
    assert ensure(DataConfig(path=texts_cfg.path, seq_len=5, seed=9), moved) == prefix
    assert "using the tokens cached" in said[-1]
    assert ensure(DataConfig(path=texts_cfg.path, append_eos=False), tokenizer_dir) != prefix
    other = edited(tokenizer_dir, tmp_path / "other", "tokenizer_config.json", lambda c: c.update(x=1))
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer_dir)
    assert ensure(texts_cfg, other) != prefix
    with open(texts_cfg.path, "a") as stream:
        stream.write('{"text": "more"}\n')
    assert ensure(texts_cfg, tokenizer_dir) != prefix


def flip(path: Path) -> None:
    """Flips a bit."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x80
    path.write_bytes(raw)


@each(
    ("name", "damage", "said"),
    [
        ("tokens.bin", flip, "tokens.bin has another checksum than when it was written"),
        ("tokens.idx", flip, "tokens.idx has another checksum"),
        ("tokens.bin", lambda path: path.write_bytes(b""), "tokens.bin holds 0 bytes, not "),
        ("tokens.bin", Path.unlink, "tokens.bin: No such file"),
        ("counts.json", lambda path: path.write_bytes(b""), "counts.json holds 0 bytes"),
        ("checksums.json", Path.unlink, "checksums.json cannot be read"),
        ("checksums.json", lambda path: path.write_text("[1]"), "checksums.json does not list sizes"),
        ("checksums.json", lambda path: path.write_text('{"a": 1}'), "checksums.json does not list sizes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_damaged_cache_is_named_and_made_again(
    texts_cfg, tokenizer_dir, tmp_path, name: str, damage, said: str
) -> None:
    lines: list[str] = []
    prefix = ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache", lines.append)
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.suffix != ".json"}
    damage(prefix.parent / name)
    again = ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache", lines.append)
    assert f"is damaged ({said}" in lines[1]
    assert "made again from the text" in lines[1]
    assert "tokenised 3 documents" in lines[2]
    assert again == prefix
    assert before == {
        path.name: path.read_bytes() for path in again.parent.iterdir() if path.suffix != ".json"
    }
    ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache", lines.append)
    assert "using the tokens cached" in lines[3]
    assert list((tmp_path / "cache").iterdir()) == [prefix.parent]


@each("counts", ['{"max_token_id": 5}', '{"a": 1}', ""])
def test_counts_beside_a_users_pair_are_not_believed(tmp_path: Path, counts: str) -> None:
    with IndexedWriter(tmp_path / "tokens", np.int32) as writer:
        writer.add_document([1, 60000])
    (tmp_path / "counts.json").write_text(counts)
    assert read_counts(tmp_path / "tokens") is None
    with pytest.raises(DataError, match="holds ids from 1 to 60000"):
        check_ids(tmp_path / "tokens", 300)


def with_bos(source: Path, target: Path) -> Path:
    """The tokenizer, which now begins every text with a token of its own, id 300, as Gemma's does."""
    bos = {"id": 300, "content": "<bos>", "special": True, "single_word": False}
    bos |= {"lstrip": False, "rstrip": False, "normalized": False}
    pieces = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    post["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [300], "tokens": ["<bos>"]}}

    def change(content) -> None:
        content["added_tokens"].append(bos)
        content["post_processor"] = post

    edited(source, target, "tokenizer.json", change)
    settings = json.loads((target / "tokenizer_config.json").read_text()) | {"bos_token": "<bos>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_documents_begin_as_the_tokenizer_begins_texts(texts_cfg, tokenizer_dir, tmp_path) -> None:
    folder, said = with_bos(tokenizer_dir, tmp_path / "gemma"), []
    tokenizer = load_tokenizer(folder, True)
    plain = [tokenizer.encode(t, add_special_tokens=False) + [0] for t in TEXTS if t]
    prefixes = {}
    for option, begin in (("auto", [300]), (True, [300]), (False, [])):
        cfg = DataConfig(path=texts_cfg.path, prepend_bos=option)
        prefixes[option] = ensure_tokenised(cfg, folder, tmp_path / "cache", said.append)
        indexed = IndexedDataset(prefixes[option])
        found = [indexed.document(i).tolist() for i in range(indexed.num_documents)]
        assert found == [begin + ids for ids in plain]
        assert ("each after <bos>" if begin else "without a token before each") in said[-1]
    assert tokenizer("hello world")["input_ids"] + [0] == [300, *plain[0]]
    assert len(set(prefixes.values())) == 3
    # A tokenizer that has such a token and does not put it before texts by itself.
    assert first_tokens(load_tokenizer(tokenizer_dir, True), "auto") == []
    assert first_tokens(load_tokenizer(tokenizer_dir, True), True) == [0]
    bare = edited(tokenizer_dir, tmp_path / "bare", "tokenizer_config.json", lambda c: c.pop("bos_token"))
    with pytest.raises(DataError, match="data.prepend_bos=True: the tokenizer has no beginning-of-sequence"):
        first_tokens(load_tokenizer(bare, True), True)


@each(
    ("name", "text", "said"),
    [
        ("tokenizer_config.json", "", "is not JSON"),
        ("tokenizer_config.json", "[1]", "holds no JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "nests lists and objects too deeply"),
        ("special_tokens_map.json", "{", "is not JSON"),
    ],
)
def test_damaged_settings_are_found_by_the_check(
    tokenizer_dir, tmp_path, name: str, text: str, said: str
) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "t")
    (folder / name).write_text(text)
    (mistake,) = check_tokenizer(folder)
    assert said in mistake.rule
    assert mistake.value == str(folder / name)


# The second is looked at only when the tokenizer is used.
@pytest.mark.parametrize("field, value", [("eos_token", 7), ("model_max_length", "16")])
def test_settings_that_transformers_rejects_are_a_sentence(tokenizer_dir, tmp_path, field, value) -> None:
    folder = edited(
        tokenizer_dir, tmp_path / "t", "tokenizer_config.json", lambda c: c.update({field: value})
    )
    with pytest.raises(DataError, match="t': holds a tokenizer that transformers cannot load"):
        load_tokenizer(folder, True)


def test_token_files_are_used_as_they_are(tokenizer_dir, tmp_path) -> None:
    with IndexedWriter(tmp_path / "p", np.int32) as writer:
        writer.add_document([1, 2, 3])
    found = ensure_tokenised(DataConfig(path=str(tmp_path / "p.bin")), tokenizer_dir, tmp_path / "cache")
    assert found == tmp_path / "p"
    assert read_counts(found) is None
    assert not (tmp_path / "cache").exists()


def test_cache_where_nothing_may_be_written(texts_cfg, tokenizer_dir, tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        DiskError, match="cache='Permission denied': could not be written. Make the folder writable"
    ):
        ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache")


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_race_for_one_entry(texts_cfg, tokenizer_dir, tmp_path, locks: bool) -> None:
    code = """
import sys
from recipes.data import tokenise
from recipes.runtime import claim
if sys.argv[4] == "False":
    def no_lock(*_):
        raise OSError(37, "No locks available")
    claim.fcntl.flock = no_lock
from recipes.data.config import DataConfig
print("prefix", tokenise.ensure_tokenised(DataConfig(path=sys.argv[1]), sys.argv[2], sys.argv[3]))
"""
    arguments = [texts_cfg.path, str(tokenizer_dir), str(tmp_path / "cache"), str(locks)]
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: run_code(code, *arguments), range(2)))
    said = [run.out for run in runs]
    assert [run.code for run in runs] == [0, 0], runs
    assert len({text.split("prefix ")[1] for text in said}) == 1
    if locks:
        assert sum("tokenised 3 documents" in text for text in said) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_second_to_finish_takes_the_entry_of_the_first(
    texts_cfg, tokenizer_dir, tmp_path, monkeypatch
) -> None:
    """Where locks do not hold: an entry that appears during the work is kept, and ours is dropped."""
    real, entry = cache._rename_folder, []

    def overtaken(temporary: Path, target: Path) -> None:
        entry.append((shutil.copytree(temporary, target) / "tokens.bin").stat().st_ino)
        real(temporary, target)

    monkeypatch.setattr(cache, "_rename_folder", overtaken)
    prefix = ensure_tokenised(texts_cfg, tokenizer_dir, tmp_path / "cache")
    assert entry == [Path(f"{prefix}.bin").stat().st_ino]
    assert list((tmp_path / "cache").iterdir()) == [prefix.parent]


def test_whether_a_tokenizer_fits(tokenizer_dir, tmp_path) -> None:
    assert check_tokenizer(tokenizer_dir) == check_tokenizer(tokenizer_dir, 300) == []
    (mistake,) = check_tokenizer(tokenizer_dir, 299, where="model.tokenizer")
    assert str(mistake).startswith("model.tokenizer=")
    assert "does not fit: its largest id is 299, the model's vocabulary has 299 entries" in mistake.rule

    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer" in check_tokenizer(tmp_path / "empty")[0].rule
    assert "is not a folder" in check_tokenizer(tmp_path / "none")[0].rule
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    assert "cannot be read" in check_tokenizer(tmp_path / "empty")[0].rule


def test_added_tokens_beyond_the_vocabulary_are_let_through(tokenizer_dir, tmp_path) -> None:
    image = {"id": 300, "content": "<image>", "special": True, "single_word": False}
    image |= {"lstrip": False, "rstrip": False, "normalized": False}
    more = edited(tokenizer_dir, tmp_path / "m", "tokenizer.json", lambda c: c["added_tokens"].append(image))
    assert check_tokenizer(more, 300) == []


def test_folder_without_tokenizer_json(tokenizer_dir, tmp_path) -> None:
    """GPT-2's older form, vocab.json and merges.txt, goes by way of transformers."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert check_tokenizer(folder, 300) == []
    assert "largest id is 299" in check_tokenizer(folder, 100)[0].rule
    text = "the quick brown fox\n"
    expected = load_tokenizer(tokenizer_dir, True).encode(text, add_special_tokens=False)
    assert load_tokenizer(folder, True).encode(text, add_special_tokens=False) == expected


def test_bpe_is_deterministic_and_spells_any_text(tmp_path) -> None:
    documents = ["aaa bbb aaa bbb ccc\n" * 4, "zebra zebra zeal\n"]
    sizes = [train_byte_level_bpe(iter(documents), 290, tmp_path / name) for name in "ab"]
    assert sizes[0] == sizes[1] <= 290
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a", append_eos=True)
    assert tokenizer.is_fast
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    strange = "\u4f60\u597d \U0001f600\t\x00 nai\u0308ve  'll\n\n x"
    assert tokenizer.decode(tokenizer.encode(strange, add_special_tokens=False)) == strange
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]
    train_byte_level_bpe(documents, 280, tmp_path / "a")
    assert check_tokenizer(tmp_path / "a", 280) == []
    with pytest.raises(DataError, match="vocab_size=256: leaves no room for 256 bytes.* Give 257 or more"):
        train_byte_level_bpe(documents, 256, tmp_path / "c")


def test_memory_that_a_limit_does_not_leave_is_a_sentence(texts_cfg, tokenizer_dir, tmp_path) -> None:
    """The tokenizer ends the process where it gets no memory; threads of its own take most of it."""
    code = """
import resource, sys
import transformers, recipes.launch
from recipes.data import tokenise, tokenizer
from recipes.data.config import DataConfig
from recipes.runtime.machine_memory import free_and_total_bytes
tokenizer.load_tokenizer(sys.argv[2], append_eos=True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[4]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert free_and_total_bytes()[0] <= int(sys.argv[4]) * 2**20
run = lambda: tokenise.ensure_tokenised(DataConfig(path=sys.argv[1]), sys.argv[2], sys.argv[3]) and 0
sys.exit(recipes.launch._guarded(run))
"""
    arguments = [texts_cfg.path, str(tokenizer_dir)]
    enough, short = (run_code(code, *arguments, str(tmp_path / mib), mib) for mib in ("40", "10"))
    assert enough.code == 0, enough
    assert short.code == 1, short
    [line] = [line for line in short.err.splitlines() if line.startswith("error: ")]
    assert "the limit on this process's memory (ulimit -v) leaves" in line and "Raise the limit" in line
