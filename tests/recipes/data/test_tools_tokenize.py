"""The command, as people run it, and how commands end."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from moe.errors import DataError, ExactnessError, Mistake
from recipes.data.config import BlendConfig, DataConfig
from recipes.data.indexed import IndexedDataset
from recipes.data.repeats import describe_repeats
from recipes.runtime.claim import InUseError, claim, lock_beside
from tests.forked_commands import Ended, run_module
from tools.command import run_command
from tools.tokenize import build_parser, main


def run(*flags: str) -> Ended:
    return run_module("tools.tokenize", *flags)


@pytest.fixture
def flags(tmp_path: Path, tokenizer_dir: Path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown {name}\n" * 20)
    (tmp_path / "empty.txt").touch()
    return ["--input", f"{tmp_path}/*.txt", "--tokenizer", str(tokenizer_dir), "--out", f"{tmp_path}/out"]


def test_as_a_module(flags: list[str], tmp_path: Path) -> None:
    done = run(*flags, "--json", "-")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    indexed = IndexedDataset(tmp_path / "out")
    assert (figures["documents"], figures["empty_documents"]) == (2, 1)
    assert figures["tokens"] == indexed.num_tokens
    assert figures["text_bytes"] == 2 * 20 * len("the quick brown a\n")
    assert {"seconds", "tokens_per_second", "output"} <= set(figures)
    assert "2 documents, " in done.err
    assert indexed.document(0)[-1] == 0
    again = run(*flags)
    assert again.code == 2
    assert again.err.startswith("error: --out=")
    assert "exists already. Delete it, or give another prefix." in again.err
    assert "Traceback" not in again.err


def test_one_writer_and_nothing_left_of_a_killed_one(flags: list[str], tmp_path: Path) -> None:
    left, other = tmp_path / ".out.bin.tmp-12-ab", tmp_path / ".out2.bin.tmp-12-ab"
    for path in (left, other):
        path.touch()
    with claim(lock_beside(tmp_path / "out"), "--out", "out"):
        with pytest.raises(InUseError, match=r"--out='.*out': it is in use by process \d+"):
            main(flags)
        assert left.exists()
    assert main(flags) == 0 and other.exists() and not left.exists()
    (tmp_path / "gone.idx").symlink_to(tmp_path / "nowhere" / "gone.idx")
    with pytest.raises(DataError, match="exists already"):
        main([*flags[:-1], str(tmp_path / "gone")])


def test_a_pair_that_was_named_by_half_is_replaced(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(source, target)

    def go() -> None:
        monkeypatch.setattr("recipes.data.indexed.rename_file", killed)
        main(flags)

    child = multiprocessing.get_context("fork").Process(target=go)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    tokens, (index,) = tmp_path / "out.bin", tmp_path.glob(".out.idx.tmp-*")
    # Somebody else's: of another size, or beside tokens that still have their hidden name.
    whole = tokens.read_bytes()
    tokens.write_bytes(whole + b"..")
    with pytest.raises(DataError, match="out.bin': exists already"):
        main(flags)
    tokens.write_bytes(whole)
    hidden = tmp_path / index.name.replace(".idx.", ".bin.")
    hidden.touch()
    with pytest.raises(DataError, match="out.bin': exists already"):
        main(flags)
    hidden.unlink()
    assert main(flags) == 0
    assert IndexedDataset(tmp_path / "out").num_documents == 2
    assert not index.exists() and tokens.read_bytes() == whole
    index.touch()
    (tmp_path / "out.idx").unlink()
    with pytest.raises(DataError, match="out.bin': exists already"):
        main(flags)


def test_what_is_given_twice_is_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "d.txt").hardlink_to(tmp_path / "b.txt")
    (tmp_path / "e.txt").write_bytes((tmp_path / "b.txt").read_bytes())
    (tmp_path / "f.txt").write_text("the quick brown c\n" * 20)  # as long as the others
    (tmp_path / "void.txt").touch()
    assert main(flags) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "warning: 3 files are in the data twice, by link or content, and counted twice: " in line
    assert f"{tmp_path}/c.txt is a link to {tmp_path}/a.txt; {tmp_path}/d.txt is the same as" in line
    assert f"{tmp_path}/e.txt is the same as {tmp_path}/b.txt" in line and "f.txt" not in line
    blend = [BlendConfig(str(tmp_path / name), 1.0) for name in ("a.txt", "[af].txt")]
    assert f"{tmp_path}/a.txt in two sources" in str(describe_repeats(DataConfig(blend=blend)))
    assert describe_repeats(DataConfig(blend=blend[:1])) is describe_repeats(DataConfig()) is None


def test_mistakes_exit_2_with_all_of_them(tokenizer_dir: Path) -> None:
    done = run("--input", "/none.txt", "/none.docx", "--tokenizer", "/none", "--out", "/tmp/never")
    assert done.code == 2
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("error: --input='/none.txt': does not exist.")
    assert lines[2].startswith("error: --tokenizer='/none': is not a folder.")


def test_flags_reach_the_config(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "quick quick"}\n')
    flags[1] = str(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="--input=.*has no 'text'; it has 'body'"):
        main(flags)
    figures = tmp_path / "figures.json"
    assert main([*flags, "--text-key", "body", "--no-eos", "--json", str(figures)]) == 0
    assert "1 documents, " in capsys.readouterr().out
    assert json.loads(figures.read_text())["documents"] == 1
    assert 0 not in IndexedDataset(tmp_path / "out").document(0)


def test_json_is_refused_before_the_work(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--json='.*': is a folder. Name a file in it"):
        main([*flags, "--json", str(tmp_path)])
    assert not (tmp_path / "out.bin").exists()


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for action in build_parser()._actions:
        assert action.help
        assert action.option_strings[-1] in text


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (DataError([Mistake("a", 1, "is bad", "Fix it."), Mistake("b", 2, "is worse", "Fix it too.")]), 2,
         "error: a=1: is bad. Fix it.\nerror: b=2: is worse. Fix it too.\n"),
        (ExactnessError("layer 3 differs"), 1, "error: layer 3 differs\n"),
        (KeyboardInterrupt(), 130, "error: interrupted.\n"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 2, "error: no space left on the disk for /x/y. Free"),
    ],
)  # fmt: skip
def test_how_commands_end(
    outcome: object, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, int)
        return outcome

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_bugs_keep_their_traceback() -> None:
    def command() -> int:
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        run_command(command)
