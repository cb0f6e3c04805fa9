"""An output folder appears whole; what is in its way is refused, and nobody else's files are touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe.errors import ConfigError, DiskError
from recipes.models.export.output_folder import output_folder
from tests.grid import each


def write(out: Path, *, replaces: bool = False, resumes: bool = False) -> None:
    with output_folder(out, replaces=replaces, resumes=resumes) as folder:
        (folder / "file").write_text("new")


@each("resumes", [False, True])
def test_it_appears_whole_and_leaves_nothing_beside(resumes: bool, tmp_path: Path) -> None:
    write(tmp_path / "out", resumes=resumes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


@each(
    "make",
    [lambda path: path.mkdir(), lambda path: path.touch(), lambda path: path.symlink_to("nowhere")],
)
def test_what_is_there_is_refused_before_the_work(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(ConfigError, match="it exists already"), output_folder(tmp_path / "out"):
        raise AssertionError("it has begun")


@each("resumes", [False, True])
@each("kind", ["file", "link"])
def test_files_and_links_under_the_temporary_name_are_somebodys(
    kind: str, resumes: bool, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "kept").touch()
    temporary = tmp_path / ".tmp-out"
    if kind == "link":
        temporary.symlink_to(tmp_path / "others")
    else:
        temporary.touch()
    with pytest.raises(DiskError, match=r"\.tmp-out"):
        write(tmp_path / "out", resumes=resumes)
    assert (tmp_path / "others" / "kept").exists() and temporary.exists()
    assert not (tmp_path / "out").exists()


def test_a_link_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it exists already"), output_folder(tmp_path / "out"):
        (tmp_path / "out").symlink_to("nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(DiskError, match="could not be written"):
        write(tmp_path / "out", replaces=True)
