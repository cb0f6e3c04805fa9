"""Results of earlier processes of a run, whatever has become of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.tracking.results import Results

_ROW = {"model": "moe", "label": "MoE", "val_loss": 1.0, "tokens": 5, "tokens_per_s": None}


def changed(**values: object) -> bytes:
    """A summary with other values."""
    return json.dumps({"results": [_ROW], "timings": {"total_s": 1.0}} | values).encode()


def test_whole_results_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "summary.json"
    assert Results.read(path) == {}
    path.write_bytes(changed())
    assert Results.read(path)["results"] == [_ROW]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        changed()[:40],
        bytes(300),
        b"[]",
        b"[" * 100_000,
        changed(results={}),
        changed(results=[5]),
        changed(results=[{"model": "moe"}]),
        changed(results=[_ROW | {"model": "what"}]),
        changed(results=[_ROW | {"tokens": "many"}]),
        changed(timings=[]),
        changed(timings={"total_s": "long"}),
        changed(stages=[1]),
        changed(training=[]),
        changed(energy=5),
    ],
)
def test_damaged_results_are_named_and_made_anew(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    results = Results(path, Results.read(path), writes=True)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ") and line.endswith("; it is made anew from here on")
    results.write()
    assert json.loads(path.read_text()) == {"results": [], "timings": {}}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_odd_files_are_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "summary.json")
    assert Results.read(tmp_path / "summary.json") == {}
    assert capsys.readouterr().err.count("\n") == 1
