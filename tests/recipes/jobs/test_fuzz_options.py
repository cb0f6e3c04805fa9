"""Whatever a command line says, it is a run or a sentence: exit code 2, no traceback, no folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recipes.jobs.session
from recipes.config.compose import CONF, compose_config, quoted
from recipes.launch import main
from tests.conftest import MakeCheckpoint
from tests.fuzzing import JSON, TEXTS, fuzzed
from tests.recipes.jobs.composed_once import composed_once

# One sentence or more about a place and its value.
LINE = re.compile(r"error: .+=.*: .+[.?)].*", re.DOTALL)
GROUPS = ("router", "upcycle", "engine", "optim", "data", "attention")


@cache
def leaves(choice: str) -> list[str]:
    """Every option under a choice."""
    return _paths(compose_config(["+recipe=upcycle", choice]))


def _paths(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict) or not values:
        return [prefix]
    return [leaf for key, value in values.items() for leaf in _paths(value, f"{prefix}.{key}".lstrip("."))]


def written(value: Any) -> str:
    """A value as an override has it: texts in quotes, lists and mappings in hydra's form."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{quoted(key)}:{written(inner)}' for key, inner in value.items())}}}"
    return "null" if value is None else json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


CHOICES = sorted(f"{group}={path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml"))
OVERRIDES = st.sampled_from(CHOICES).flatmap(
    lambda choice: st.tuples(
        st.just(choice),
        st.lists(
            st.tuples(st.sampled_from(leaves(choice)), st.one_of(JSON.map(written), TEXTS)),
            min_size=1,
            max_size=4,
        ),
    )
)

Say = Callable[[list[str]], tuple[int, list[str]]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Gives exit code and lines of a command up to where its run would begin."""
    monkeypatch.setattr(recipes.jobs.session, "run_job", lambda *given: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def run(arguments: list[str]) -> tuple[int, list[str]]:
        with composed_once():
            code = main(arguments)
        out, err = capsys.readouterr()
        assert out == ""
        return code, err.splitlines()

    return run


@fuzzed(30)
@given(drawn=OVERRIDES)
def test_any_options_are_a_run_or_a_sentence(
    drawn: tuple[str, list[tuple[str, str]]], say: Say, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    choice, given = drawn
    dense = [f"dense={make_checkpoint('llama')}"] if len(choice) % 2 else []
    options = [f"{path}={value}" for path, value in given]
    code, lines = say(["+recipe=upcycle", "data.seq_len=16", *dense, choice, *options])
    assert code in (0, 2), lines
    assert not list(tmp_path.iterdir()), "something was written"
    if code:
        assert lines and LINE.fullmatch("\n".join(lines)), lines
