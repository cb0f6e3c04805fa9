"""What the system refuses is a sentence in every command; bugs keep their traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from recipes.runtime.system_errors import Remedies, system_sentence
from tests.grid import each
from tools.command import run_command, tool_parser

_REMEDIES = Remedies(memory="M.", limit="L.", full="D.", file="F.")


def refused(code: int, name: str | None) -> OSError:
    error = OSError(code, os.strerror(code)) if name is None else OSError(code, os.strerror(code), name)
    try:
        raise error
    except OSError as raised:
        return raised


@each(
    ("error", "words"),
    [
        (refused(errno.ENAMETOOLONG, "/x/" + "a" * 5000), "... (5,003 characters): File name too long, in "),
        (refused(errno.EFBIG, None), "File too large, in "),
        (refused(errno.EMFILE, None), "Too many open files, in "),
        (refused(errno.EISDIR, "a\nb"), "a\\nb: Is a directory, in "),
        (refused(errno.EDQUOT, None), "no space left on the disk. D."),
        (RuntimeError("Could not determine home directory."), "a path begins with ~ and the name of a user"),
    ],
)
def test_a_refusal_in_a_sentence(error: BaseException, words: str) -> None:
    said = system_sentence(error, _REMEDIES)
    assert said is not None and said[1] == 2 and words in said[0], said
    assert len(said[0]) < 500 and "\n" not in said[0] and said[0].endswith((" F.", " D."))


@each(
    "error",
    [
        refused(errno.EIO, None),
        refused(errno.ECONNREFUSED, None),
        RuntimeError("shape mismatch"),
        KeyError("x"),
    ],
)
def test_other_errors_are_none_of_the_systems(error: BaseException) -> None:
    assert system_sentence(error, _REMEDIES) is None


def test_a_tool_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: len((tmp_path / "gone").read_text()))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/gone: No such file or directory, in ")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: len(bytearray(1 << 62)))
    assert ended.value.code == 1 and "error: not enough memory, in " in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: bool(tool_parser("x", "y", example="").parse_args(["\udcff"])))
    assert ended.value.code == 2 and "bytes that are not UTF-8" in capsys.readouterr().err
