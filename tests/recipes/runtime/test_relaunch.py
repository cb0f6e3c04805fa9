"""Which run directory a process takes that torchrun has started in the place of another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moe.errors import ConfigError
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.jobs.run_dir import RunDir, choose_run_dir
from recipes.runtime.relaunch import Launch
from recipes.runtime.run_file import write_run_file

FIRST = Launch("none", "host 10 100.00", "host 11 101.00")
# The same torchrun process has started another rank 0.
AGAIN = dataclasses.replace(FIRST, process="host 12 150.00")
LATER = Launch("none", "host 20 200.00", "host 21 201.00")


def choose(outputs: Path, launch: Launch | None, *overrides: str) -> RunDir:
    """The answer for a command line."""
    arguments = ["+recipe=upcycle", f"output_dir={outputs}", *overrides]
    return choose_run_dir(parse_config(compose_config(arguments)), launch)


def claimed(path: Path, launch: Launch, started: float = 1.0) -> Path:
    """A run directory that nothing has been written to but by whom it was claimed."""
    path.mkdir(parents=True)
    write_run_file(path, **launch.record(), started=started)
    return path


@pytest.mark.parametrize("resume", ["none", "auto"])
@pytest.mark.parametrize("name", ["a", "null"])
def test_a_restart_goes_on_with_its_own_run(tmp_path: Path, resume: str, name: str) -> None:
    mine = claimed(tmp_path / ("a" if name == "a" else "upcycle-3"), FIRST)
    claimed(tmp_path / "upcycle-4", LATER)  # begun meanwhile by somebody else
    (tmp_path / "upcycle-5").mkdir()
    options = (f"run.name={name}", f"resume={resume}")
    assert choose(tmp_path, AGAIN, *options) == RunDir(mine, resumed=True)


def test_a_new_command_does_not_take_it(tmp_path: Path) -> None:
    claimed(tmp_path / "upcycle-1", FIRST)
    claimed(tmp_path / "a", FIRST)
    for launch in (LATER, None, FIRST):  # the last: a second job of the very same process
        assert choose(tmp_path, launch) == RunDir(tmp_path / "upcycle-2")
        with pytest.raises(ConfigError, match="holds a run already"):
            choose(tmp_path, launch, "run.name=a")


def test_a_restart_of_a_run_from_a_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "other" / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    mine = claimed(tmp_path / "b", FIRST)
    with pytest.raises(ConfigError, match="a checkpoint starts a new one"):
        choose(tmp_path, LATER, f"resume={step}", "run.name=b")
    # It has not saved anything yet: it starts from there once more.
    assert choose(tmp_path, AGAIN, f"resume={step}", "run.name=b") == RunDir(mine, resumed=True, fork=step)


def test_a_process_killed_before_it_claimed_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-run.json-11").write_text("{")
    assert choose(tmp_path, AGAIN, "run.name=a") == RunDir(tmp_path / "a")
    assert choose(tmp_path, AGAIN) == RunDir(tmp_path / "upcycle-1")


def test_the_first_rank_moved_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = dataclasses.replace(FIRST, run_id="job-7")
    mine = claimed(tmp_path / "upcycle-1", named)
    moved = Launch("job-7", "other 5 90.00", "other 6 160.00")
    # Without a restart it is another launch under the same name.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert choose(tmp_path, moved) == RunDir(tmp_path / "upcycle-2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert choose(tmp_path, moved) == RunDir(mine, resumed=True)
    # What has no name of its own is not told apart by it.
    nameless = dataclasses.replace(moved, run_id="none")
    claimed(tmp_path / "upcycle-2", FIRST)
    assert choose(tmp_path, nameless) == RunDir(tmp_path / "upcycle-3")


def test_the_newest_of_several(tmp_path: Path) -> None:
    claimed(tmp_path / "upcycle-1", FIRST, 5.0)
    newest = claimed(tmp_path / "upcycle-2", FIRST, 9.0)
    claimed(tmp_path / "upcycle-3", FIRST, 7.0)
    assert choose(tmp_path, AGAIN) == RunDir(newest, resumed=True)


def test_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Launch.of_this_process() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    found = Launch.of_this_process()
    assert found is not None and found == Launch.of_this_process()
    assert found.agent != found.process
    path = claimed(tmp_path / "a", dataclasses.replace(found, process="before"))
    assert found.restarts(path)
    (path / "run.json").write_text("{")
    assert not found.restarts(path)
