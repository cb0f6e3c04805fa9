"""Tokenizers with code of their own: with trust it runs, everywhere; else a sentence, and nothing runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import tools.tokenize
from moe.errors import DataError, DiskError
from recipes.data.chat_template import ChatFormat
from recipes.data.config import DataConfig
from recipes.data.conversations import Conversation
from recipes.data.indexed import IndexedDataset
from recipes.data.reply_spans import SpanError
from recipes.data.span_tokens import _mark_by_prefixes, mark_spans
from recipes.data.tokenise import ensure_tokenised, tokenise
from recipes.data.tokenizer import check_tokenizer, load_tokenizer, spelled, tokenizer_fingerprint
from recipes.runtime.code_folder import private_code_folder
from tests.grid import each
from tests.recipes.data.chat_cases import talk
from tests.recipes.data.own_tokenizer import LETTERS, give_own_tokenizer, own_ids

TEXT = "all who keep 3 books,\nna\u00efve"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with such a tokenizer; its marker is ``ran`` beside it."""
    (tmp_path / "own").mkdir()
    return give_own_tokenizer(tmp_path / "own", tmp_path / "ran")


def settings(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_trusted_code_gives_the_ids(own: Path, tmp_path: Path) -> None:
    assert check_tokenizer(own, len(LETTERS), trust_remote_code=True) == []
    assert "largest id is 127" in check_tokenizer(own, 100, trust_remote_code=True)[0].rule
    tokenizer = load_tokenizer(own, True, trust_remote_code=True)
    assert tokenizer(TEXT)["input_ids"] == own_ids(TEXT)
    assert LETTERS.index("ll") in own_ids(TEXT) and 0 in own_ids(TEXT)
    # A model may choose a row that only fills its embedding.
    assert spelled(tokenizer, [*own_ids("book"), 299]) == "book"
    # No other process sees, or is overtaken in, the copy that was imported.
    assert Path(sys.modules[type(tokenizer).__module__].__file__ or "").is_relative_to(private_code_folder())


@pytest.mark.parametrize("config", [None, "llama"])
def test_without_trust_nothing_runs(own: Path, tmp_path: Path, config: str | None) -> None:
    # transformers would make a tokenizer of a family that it has, of whatever files there are.
    if config is not None:
        (own / "config.json").write_text(json.dumps({"model_type": config}))
    (own / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    (own / "merges.txt").write_text("#version: 0.2\n")
    (mistake,) = check_tokenizer(own)
    assert "a tokenizer with code of its own (auto_map in tokenizer_config.json)" in mistake.rule
    assert "set trust_remote_code=true (tools: --trust-remote-code)" in mistake.remedy
    with pytest.raises(DataError, match="with code of its own"):
        load_tokenizer(own, True)
    assert not (tmp_path / "ran").exists()


def test_the_command_takes_trust(own: Path, tmp_path: Path) -> None:
    (tmp_path / "a text.txt").write_text(TEXT)
    given = ["--input", str(tmp_path / "a text.txt"), "--tokenizer", str(own), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="with code of its own"):
        tools.tokenize.main(given)
    assert not (tmp_path / "ran").exists()
    assert tools.tokenize.main([*given, "--trust-remote-code"]) == 0
    assert IndexedDataset(tmp_path / "out").document(0).tolist() == [*own_ids(TEXT), LETTERS.index("<end>")]


def test_a_class_of_transformers_needs_no_code(tokenizer_dir: Path, own: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_dir, tmp_path / "native"))
    expected = load_tokenizer(folder, True)(TEXT)["input_ids"]
    # Named, not there: the class of transformers is taken, whoever is trusted.
    settings(folder, auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    for trust in (False, True):
        assert load_tokenizer(folder, True, trust_remote_code=trust)(TEXT)["input_ids"] == expected
    # There, too: as transformers does, trusted code is taken.
    for name in ("tokenization_own.py", "pieces.py", "letters.own"):
        shutil.copyfile(own / name, folder / name)
    assert load_tokenizer(folder, True)(TEXT)["input_ids"] == expected
    assert not (tmp_path / "ran").exists()
    assert load_tokenizer(folder, True, trust_remote_code=True)(TEXT)["input_ids"] == own_ids(TEXT)
    first, second = (tokenizer_fingerprint(folder, trust_remote_code=trust) for trust in (False, True))
    assert first == tokenizer_fingerprint(folder) != second


@each(
    ("pair", "said"),
    [
        (
            ["some/where--tokenization_own.OwnTokenizer", None],
            "lies in the repository some/where .* none is fetched",
        ),
        (["tokenization_gone.OwnTokenizer", None], "its tokenization_gone.py is not there"),
        ("tokenization_own.OwnTokenizer", "names no class as"),
        (["OwnTokenizer", None], "names no class as"),
        (["tokenization_own.Nobody", None], "cannot be read .*Nobody"),
    ],
)
def test_code_that_cannot_run_is_named(own: Path, pair: object, said: str) -> None:
    settings(own, auto_map={"AutoTokenizer": pair})
    with pytest.raises(DataError, match=said):
        load_tokenizer(own, True, trust_remote_code=True)


def test_changed_code_is_tokenised_with_anew(own: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all books")

    def ids() -> tuple[Path, list[int]]:
        cfg = DataConfig(path=str(tmp_path / "a.txt"), append_eos=False)
        prefix = ensure_tokenised(cfg, own, tmp_path / "cache", lambda line: None, trust_remote_code=True)
        return prefix, IndexedDataset(prefix).document(0).tolist()

    before, first = ids()
    assert first == own_ids("all books") and ids()[0] == before
    # Not the file that is named, but one that it imports.
    (own / "pieces.py").write_text("def pieces(text):\n    return list(text)\n")
    after, second = ids()
    assert after != before
    assert second == [LETTERS.index(letter) for letter in "all books"]


def test_replies_are_counted_without_offsets(own: Path) -> None:
    settings(own, chat_template="{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}")
    chat = ChatFormat(DataConfig(path="x", format="chat"), own, trust_remote_code=True)
    row = talk("user: all", "bot: b\u00e9ok", "user: no", "bot: hell")
    ids, counted = chat.encode(Conversation(row["messages"], "rows.jsonl:7", 0))
    text = "[u]all;[a]b\u00e9ok;[u]no;[a]hell;"
    assert ids.tolist() == own_ids(text)
    # The replies with their last letter, which ends the turn.
    assert "".join(LETTERS[i] for i in ids[counted]) == "b<unk>ok;hell;"


def test_a_token_across_the_beginning_of_a_reply_is_refused(own: Path) -> None:
    settings(own, chat_template="{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}")
    chat = ChatFormat(DataConfig(path="x", format="chat"), own, trust_remote_code=True)
    row = talk("user: b", "bot: abc")  # "aabc": the role's letter and the reply's first are one token
    with pytest.raises(DataError, match="rows.jsonl:7.*no token ends with"):
        chat.encode(Conversation(row["messages"], "rows.jsonl:7", 0))


def test_places_by_prefixes_are_those_of_offsets(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir, False)
    text = "the quick brown fox<|endoftext|> jumps over\n the lazy caf\u00e9 \u4f60\u597d"
    found = refused = 0
    for start in range(len(text)):
        for end in (start + 5, len(text)):
            try:
                ids, own = _mark_by_prefixes(tokenizer, text, [(start, min(end, len(text)))])
            except SpanError:
                refused += 1
                continue
            expected = mark_spans(tokenizer, text, [(start, min(end, len(text)))])
            assert (ids.tolist(), own.tolist()) == (expected[0].tolist(), expected[1].tolist()), (start, end)
            found += 1
    assert found > 20 and refused > 20


@each(
    ("old", "new", "said"),
    [
        ("self.places.get(token, 0)", "None if token == 'b' else 1", "fails on a text .'NoneType'"),
        ("self.places.get(token, 0)", "1 - 2 * (token == 'b')", "gives ids from -1 to 1"),
        (
            "self.places.get(token, 0)",
            "1 + 70000 * (token == 'b')",
            "gives ids from 1 to 70001, .* 128 entries",
        ),
        (
            "return pieces(text)",
            "return text[9] and pieces(text) if len(text) > 1 else []",
            "string index out",
        ),
        ("Path(vocab_file)", "exit() or Path(vocab_file)", "its code ends the process"),
    ],
)
def test_code_that_fails_is_a_sentence(own: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "a.txt").write_text("a b")
    code = give_own_tokenizer(own, tmp_path / "ran") / "tokenization_own.py"
    code.write_text(code.read_text().replace(old, new))
    with pytest.raises(DataError, match=said):
        tokenise(DataConfig(path=str(tmp_path / "a.txt")), own, tmp_path / "out", trust_remote_code=True)


def test_a_class_that_nobody_has_is_named(own: Path) -> None:
    settings(own, auto_map={})
    (own / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    (own / "merges.txt").write_text("#version: 0.2\n")
    (mistake,) = check_tokenizer(own)
    assert "its class is OwnTokenizer, which transformers does not have" in mistake.rule


def test_a_place_for_code_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", "/proc/nowhere")
    with pytest.raises(DiskError, match="HF_MODULES_CACHE='/proc/nowhere': no folder can be made in it"):
        private_code_folder.__wrapped__()
