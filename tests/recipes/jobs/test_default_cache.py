"""Several runs that need the same default model: one makes it, the others wait and take it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.jobs import default_model
from recipes.jobs.default_model import default_tokenizer, train_default
from recipes.runtime.claim import claim, lock_beside


class OneRank:
    """A console of one rank, which calls ``meanwhile`` while it waits."""

    def __init__(self, meanwhile: Any) -> None:
        self.lines: list[str] = []
        self.log = self.lines.append
        self.heartbeat = SimpleNamespace(progress=meanwhile, beat=lambda where: None)

    def on_rank_zero(self, work: Any) -> Any:
        return work()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run on one text file."""
    (tmp_path / "text.txt").write_text("words")
    given = [f"data.path={tmp_path / 'text.txt'}", f"cache_dir={tmp_path / 'cache'}"]
    return parse_config(compose_config(["+recipe=upcycle", *given]))


def _fails(*given: Any) -> Any:
    raise AssertionError("what another process has made is made again")


def test_a_tokenizer_that_another_run_is_making(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "train_byte_level_bpe", _fails)
    monkeypatch.setattr(default_model, "_key", lambda *parts: "k")
    other, folder = ExitStack(), Path(config.cache_dir) / "tokenizer-k"

    def meanwhile() -> None:
        folder.mkdir()
        other.close()

    console: Any = OneRank(meanwhile)
    with other:
        other.enter_context(claim(lock_beside(folder), "a", "b"))
        assert default_tokenizer(config, console) == folder
    assert any("which is making the same" in line for line in console.lines)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("stops", [False, True])
def test_a_model_that_another_run_is_training(
    tmp_path: Path, config: RunConfig, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "_train", _fails)
    dense, stop = tmp_path / "cache" / "dense-1" / "hf", SimpleNamespace(requested=False)
    with ExitStack() as other:
        other.enter_context(claim(lock_beside(dense.parent), "a", "b"))

        def meanwhile() -> None:
            stop.requested = stops
            if not stops:
                dense.mkdir(parents=True)
                (dense / "config.json").touch()
                other.close()

        console: Any = OneRank(meanwhile)
        loop: Any = SimpleNamespace(stop=stop)
        data: Any = None
        assert train_default(config, console, loop, dense, data) is not stops
