"""A checkpoint whose tokenizer is code of its own: refused, and with trust from its text to its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tools.certify
import tools.export
import tools.upcycle
import tools.verify
from moe.errors import ConfigError, DataError
from tests.conftest import MakeCheckpoint
from tests.recipes.data.own_tokenizer import own_checkpoint, own_ids
from tests.recipes.jobs.job_runs import job, process, rows, write_text

pytestmark = pytest.mark.usefixtures("one_thread")
_TEXT = "hello books, na\u00efve"


@pytest.fixture
def own(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """Such a checkpoint, in a folder whose name is no name of a module."""
    return own_checkpoint(make_checkpoint("llama"), tmp_path / "my model-1.5 \u00e9", tmp_path / "ran")


def ids_of(folder: Path) -> list[int]:
    """The ids that anybody gets from an export."""
    from transformers import AutoTokenizer

    # Not a call that the rules for our own code look for.
    tokenizer = AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": True})
    return list(tokenizer(_TEXT)["input_ids"])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a tool's main with a command line."""

    def run(tool: Any, *given: str) -> int:
        monkeypatch.setattr("sys.argv", ["tool", *given])
        return int(tool.main())

    return run


def test_a_job_of_two_ranks(
    own: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_text(tmp_path / "some text")
    options: dict[str, Any] = {"dense": f"'{own}'", "data.path": f"'{data}'", "train.steps": 2}
    options |= {"run.name": "own", "compare.cpt": False, "optim.schedule.warmup_steps": 1}
    refused = job(tmp_path, options)
    assert refused.code == 2 and "code of its own" in refused.err and not (tmp_path / "ran").exists()
    shared = tmp_path / "modules"
    monkeypatch.setenv("HF_MODULES_CACHE", str(shared))
    done = process(tmp_path, options | {"trust_remote_code": True}, ranks=2)
    assert done.code == 0, done.err
    assert len(list(shared.iterdir())) == 2, "every rank has a folder of its own"
    run = tmp_path / "outputs" / "own"
    assert len(rows(run, "moe")) == 3
    assert ids_of(run / "hf") == own_ids(_TEXT)
    export = tmp_path / "export"
    assert call(tools.export, str(run), "--out", str(export)) == 0
    assert ids_of(export) == own_ids(_TEXT)
    # The run itself has trusted the code, and an export alone has not.
    rest = ["--sequences", "1", "--sequence-length", "16", "--new-tokens", "0"]
    assert call(tools.certify, str(run), *rest) == 0
    with pytest.raises(DataError, match="--trust-remote-code"):
        call(tools.certify, str(export), *rest)
    assert call(tools.certify, str(export), *rest, "--trust-remote-code") == 0


def test_the_converter(own: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    out, text = tmp_path / "moe", tmp_path / "a.txt"
    text.write_text("the quick brown fox\n" * 200)
    convert = ("--dense", str(own), "--out", str(out), "--experts", "4", "--top-k", "2", "--text", str(text))
    with pytest.raises(ConfigError, match="code of its own"):
        call(tools.upcycle, *convert)
    assert not out.exists() and not (tmp_path / "ran").exists()
    assert call(tools.upcycle, *convert, "trust_remote_code=true") == 0
    assert ids_of(out) == own_ids(_TEXT)
    verify = ("--dense", str(own), "--moe", str(out), "--samples", "1", "--sequence-length", "16")
    with pytest.raises(ConfigError, match="code of its own"):
        call(tools.verify, *verify, "--text", str(text))
    assert call(tools.verify, *verify, "--text", str(text), "--trust-remote-code") == 0


def test_code_that_reads_what_is_not_carried_is_refused_first(own: Path, tmp_path: Path) -> None:
    (own / "rules").mkdir()
    (own / "rules" / "letters.json").write_text(json.dumps({}))
    path = own / "tokenization_own.py"
    more = "Path(vocab_file).parent / 'rules' / 'letters.json'"
    path.write_text(path.read_text().replace("super()", f"json.loads(({more}).read_text())\n        super()"))
    data = write_text(tmp_path / "text")
    ended = job(tmp_path, {"dense": f"'{own}'", "data.path": data, "trust_remote_code": True})
    assert ended.code == 2
    assert "its tokenizer does not work with what an export carries" in ended.err
