"""Where a run lives, by what the disk holds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from moe.errors import ConfigError
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.jobs.run_dir import RunDir, choose_run_dir, claim_run_dir, discard_unbegun
from recipes.runtime.claim import LOCK, InUseError, claim


def choose(outputs: Path, *overrides: str) -> RunDir:
    """The answer for a command line."""
    return choose_run_dir(
        parse_config(compose_config(["+recipe=upcycle", f"output_dir={outputs}", *overrides]))
    )


def claimed(held: ExitStack, outputs: Path, *overrides: str) -> RunDir:
    """The answer for a command line that trains there until ``held`` is closed."""
    config = parse_config(compose_config(["+recipe=upcycle", f"output_dir={outputs}", *overrides]))
    return claim_run_dir(config, None, held)


def used(path: Path) -> Path:
    """A run that has left something."""
    (path / "checkpoints" / "step-5").mkdir(parents=True)
    return path


def test_numbers_go_up_and_are_compared_as_numbers(tmp_path: Path) -> None:
    assert choose(tmp_path / "none") == RunDir(tmp_path / "none" / "upcycle-1")
    for name in ("upcycle-2", "upcycle-10", "upcycle-x", "upcycle-11-copy", "other-99", "my-upcycle-50"):
        used(tmp_path / name)
    assert choose(tmp_path) == RunDir(tmp_path / "upcycle-11")
    assert choose(tmp_path, "resume=auto") == RunDir(tmp_path / "upcycle-10", resumed=True)


@pytest.mark.parametrize(
    ("name", "content", "stays"),
    [("metrics.jsonl", "", False), ("metrics.jsonl", "{}", True), ("notes.txt", "", True)],
)
def test_a_run_that_has_not_begun_frees_its_name(
    tmp_path: Path, name: str, content: str, stays: bool
) -> None:
    with ExitStack() as held:
        run = claimed(held, tmp_path, "run.name=a").path
        (run / "config.yaml").write_text("a: 1")
        (run / "wandb").mkdir()
        (run / name).write_text(content)
        discard_unbegun(run)
        assert run.exists() is stays
    assert run.exists() is stays


def test_auto_begins_where_there_is_nothing(tmp_path: Path) -> None:
    assert choose(tmp_path, "resume=auto") == RunDir(tmp_path / "upcycle-1")
    assert choose(tmp_path, "resume=auto", "run.name=a") == RunDir(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert choose(tmp_path, "resume=auto", "run.name=a") == RunDir(tmp_path / "a")


def test_a_named_run(tmp_path: Path) -> None:
    used(tmp_path / "a")
    with pytest.raises(ConfigError, match="run.name='a': .*/a holds a run already. Set resume=auto"):
        choose(tmp_path, "run.name=a")
    assert choose(tmp_path, "run.name=a", "resume=auto") == RunDir(tmp_path / "a", resumed=True)
    assert choose(tmp_path, "run.name=b") == RunDir(tmp_path / "b")


def test_a_path_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = used(tmp_path / "elsewhere")
    expected = RunDir(run, resumed=True)
    assert choose(tmp_path / "outputs", f"resume={run}") == expected
    assert choose(tmp_path / "outputs", f"resume={run}/") == expected
    monkeypatch.chdir(tmp_path)
    assert choose(tmp_path / "outputs", "resume=elsewhere") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(tmp_path / "outputs", 'resume="~/elsewhere"') == expected


def test_a_checkpoint_starts_a_new_run(tmp_path: Path) -> None:
    step = used(tmp_path / "upcycle-3") / "checkpoints" / "step-5"
    assert choose(tmp_path, f"resume={step}") == RunDir(tmp_path / "upcycle-4", fork=step)
    assert choose(tmp_path, f"resume={step}", "run.name=b") == RunDir(tmp_path / "b", fork=step)
    with pytest.raises(ConfigError, match="holds a run already, and a checkpoint starts a new one"):
        choose(tmp_path, f"resume={step}", "run.name=upcycle-3")


@pytest.mark.parametrize(
    ("what", "rule"), [("missing", "there is no such directory"), ("empty", "it holds no checkpoints")]
)
def test_nothing_to_go_on_with(tmp_path: Path, what: str, rule: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"resume='.*{what}': {rule}. Give a run directory, one of its"):
        choose(tmp_path, f"resume={tmp_path / what}")


def test_what_lies_where() -> None:
    run = RunDir(Path("/o/a"))
    assert (run.name, run.summary, run.export) == ("a", Path("/o/a/summary.json"), Path("/o/a/hf"))
    assert run.checkpoints("moe") == Path("/o/a/checkpoints")
    assert run.checkpoints("cpt") == Path("/o/a/cpt/checkpoints")
    # A checkpoint's run directory, as identity.py finds it.
    assert (run.checkpoints("moe") / "step-5").parent.parent == run.path


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_names_stay_in_the_output_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run.name='.*': must be a plain name"):
        choose(tmp_path, f'run.name="{name}"')


@pytest.mark.parametrize("override", ["resume=auto", "resume=PATH", "run.name=upcycle-3"])
def test_a_run_in_training_is_not_taken_over(tmp_path: Path, override: str) -> None:
    run = used(tmp_path / "upcycle-3")
    given = override.replace("PATH", str(run))
    more = ["resume=auto"] if "name" in given else []
    with ExitStack() as held:
        assert claimed(held, tmp_path, given, *more).path == run
        with pytest.raises(InUseError, match=f"{run} is in use by process"), ExitStack() as second:
            claimed(second, tmp_path, given, *more)
        assert claimed(held, tmp_path, "run.name=other").path == tmp_path / "other"
    with ExitStack() as held:
        assert claimed(held, tmp_path, given, *more) == RunDir(run, resumed=True)


def test_two_commands_without_a_name_get_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has looked for a free number before the first has taken it."""
    answers = [choose(tmp_path), choose(tmp_path)]
    assert answers[0] == answers[1]
    monkeypatch.setattr(
        "recipes.jobs.run_dir.choose_run_dir",
        lambda *given: answers.pop() if answers else choose_run_dir(*given),
    )
    with ExitStack() as held:
        assert [claimed(held, tmp_path).name for _ in "ab"] == ["upcycle-1", "upcycle-2"]


def test_a_run_that_came_and_ended_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = choose(tmp_path, "run.name=a")
    used(tmp_path / "a")
    answers = [early]
    monkeypatch.setattr(
        "recipes.jobs.run_dir.choose_run_dir",
        lambda *given: answers.pop() if answers else choose_run_dir(*given),
    )
    with pytest.raises(ConfigError, match="holds a run already"), ExitStack() as held:
        claimed(held, tmp_path, "run.name=a")


def test_the_lock_alone_is_no_run(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / LOCK, "run.name", "a"):
        assert choose(tmp_path, "run.name=a") == RunDir(tmp_path / "a")
