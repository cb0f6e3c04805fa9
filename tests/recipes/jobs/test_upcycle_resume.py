"""A run that was stopped, killed or damaged goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import (
    Ended,
    StopAt,
    digests,
    job,
    process,
    rows,
    same_training,
    steps,
    summary,
    write_text,
)


@pytest.fixture
def go(workplace: Path, text: str, first: Path) -> Callable[..., Ended]:
    """Runs under a name, beside the uninterrupted run and from the same cached default."""

    def run(name: str, stop_at: StopAt | None = None, **changes: Any) -> Ended:
        options = {key.replace("__", "."): value for key, value in changes.items()}
        return job(workplace, {"data.path": text, "run.name": name} | options, stop_at)

    return run


@pytest.fixture
def outputs(workplace: Path) -> Path:
    """Where the runs are."""
    return workplace / "outputs"


@pytest.mark.parametrize(
    ("stage", "step", "signal", "saved"),
    [("moe", 1, "SIGINT", [2]), ("moe", 4, "SIGTERM", [4, 5]), ("cpt", 2, "SIGINT", [2, 3])],
)
def test_a_run_that_was_stopped_goes_on_exactly(
    stage: str, step: int, signal: str, saved: list[int], go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    name = f"stopped-{stage}-{step}"
    stopped = go(name, StopAt(stage, step, signal))
    assert stopped.code == 130
    assert f"stopped and saved; go on with: resume={outputs / name}" in stopped.out
    checkpoints = outputs / name / ("checkpoints" if stage == "moe" else "cpt/checkpoints")
    # The signal came with the row of a step: the next one is done, saved, and the last.
    assert steps(checkpoints) == saved
    assert rows(outputs / name, stage) == rows(first, stage)[: step + 2]
    resumed = go(name, resume="auto")
    assert resumed.code == 0, resumed.err
    assert f"{stage}: going on from {checkpoints}" in resumed.out
    assert ("moe: finished by an earlier process of this run" in resumed.out) == (stage == "cpt")
    same_training(outputs / name, first)
    same_results(outputs / name, first)


def test_a_run_directory_of_an_older_version_goes_on_exactly(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    assert go("older", StopAt("moe", 4, "SIGTERM")).code == 130
    _in_the_old_form(outputs / "older")
    resumed = go("older", resume="auto")
    assert resumed.code == 0, resumed.err
    for name in ("metrics.jsonl", "load.jsonl"):  # rows of before stay as they were
        path = outputs / "older" / name
        path.write_text(path.read_text().replace('"leg":', '"stage":'))
    same_training(outputs / "older", first)


def _in_the_old_form(run_dir: Path) -> None:
    """Gives options and keys of a run directory their names of before they were renamed."""
    for name in ("metrics.jsonl", "load.jsonl"):
        path = run_dir / name
        path.write_text(path.read_text().replace('"stage":', '"leg":'))
        assert '"leg":"moe"' in path.read_text()
    changed = {"top_k_schedule": "sparsify", "upcycle_vs_cpt": "versus"}
    for name in ("config.yaml", "run.json"):
        path = run_dir / name
        content = path.read_text()
        for new, old in changed.items():
            content = content.replace(f"{new}:", f"{old}:").replace(f'"{new}"', f'"{old}"')
        assert "sparsify" in content
        path.write_text(content)


def same_results(run_dir: Path, reference: Path) -> None:
    """The summary but for its times."""
    ours, theirs = summary(run_dir), summary(reference)
    for result in ours["results"] + theirs["results"]:
        result.pop("tokens_per_s")
    assert ours["results"] == theirs["results"]
    assert ours["exactness"] == theirs["exactness"]
    assert ours["export"] == theirs["export"]


def test_resume_takes_the_path_of_a_run(go: Callable[..., Ended], outputs: Path, first: Path) -> None:
    assert go("by-path", StopAt("moe", 3)).code == 130
    resumed = go("null", resume=outputs / "by-path")
    assert resumed.code == 0, resumed.err
    same_training(outputs / "by-path", first)


def test_a_stop_while_the_default_is_trained(tmp_path: Path, text: str, workplace: Path, first: Path) -> None:
    options = {"data.path": text, "run.name": "first"}
    stopped = job(tmp_path, options, StopAt("dense", 1))
    assert stopped.code == 130
    resumed = job(tmp_path, options | {"resume": "auto"})
    assert resumed.code == 0, resumed.err
    assert "dense: going on from" in resumed.out
    same_training(tmp_path / "outputs" / "first", first, ("dense", "moe", "cpt"))


@pytest.mark.parametrize("which", ["embedded", "upcycled"])
def test_a_crash_after_the_last_step_loses_nothing(
    which: str,
    tmp_path: Path,
    text: str,
    first: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All steps are done and saved, and the process ends before it has written what follows them.
    place = "recipes.jobs.default_model._save" if which == "embedded" else "recipes.jobs.moe_stage.export_moe"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the machine is gone")

    options = {"data.path": text, "run.name": "first"}
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the machine is gone"):
        patched.setattr(place, fail)
        job(tmp_path, options)
    resumed = job(tmp_path, options | {"resume": "auto"})
    assert resumed.code == 0, resumed.err
    same_training(tmp_path / "outputs" / "first", first, ("dense", "moe", "cpt"))
    same_results(tmp_path / "outputs" / "first", first)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    workplace: Path, text: str, go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    # A save in the background may or may not be complete when the kill comes.
    options = {"data.path": text, "run.name": "killed", "train.async_save": False}
    killed = process(workplace, options, StopAt("moe", 5, "SIGKILL"))
    assert killed.code == -9
    run_dir = outputs / "killed"
    assert steps(run_dir / "checkpoints") == [2, 4]
    assert [row["step"] for row in rows(run_dir, "moe")] == [0, 1, 2, 3, 4, 5]
    # A save that the kill had interrupted, and a row that it had cut off.
    unfinished = run_dir / "checkpoints" / ".tmp-step-00000006"
    shutil.copytree(run_dir / "checkpoints" / "step-00000004", unfinished)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "moe", "step": 6, "lo')
    resumed = go("killed", resume="auto")
    assert resumed.code == 0, resumed.err
    assert f"passing over the checkpoint {unfinished}: the save was interrupted" in resumed.out
    assert f"moe: going on from {run_dir / 'checkpoints' / 'step-00000004'}" in resumed.out
    same_training(run_dir, first)
    assert not unfinished.exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    assert go("early", StopAt("moe", 1)).code == 130
    shutil.rmtree(outputs / "early" / "checkpoints")
    resumed = go("early", resume="auto")
    assert resumed.code == 0, resumed.err
    same_training(outputs / "early", first)


def test_a_damaged_checkpoint_is_named_and_passed_over(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    assert go("damaged", StopAt("moe", 3)).code == 130
    checkpoints = outputs / "damaged" / "checkpoints"
    assert steps(checkpoints) == [2, 4]
    file = checkpoints / "step-00000004" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    resumed = go("damaged", resume="auto")
    assert resumed.code == 0, resumed.err
    assert f"moe: passing over the checkpoint {checkpoints / 'step-00000004'}" in resumed.out
    assert "rank-00000.safetensors" in resumed.out
    assert f"moe: going on from {checkpoints / 'step-00000002'}" in resumed.out
    same_training(outputs / "damaged", first)


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    shutil.copytree(first, outputs / "finished")
    before, figures = digests(outputs / "finished"), summary(outputs / "finished")
    resumed = go("finished", resume="auto")
    assert resumed.code == 0, resumed.err
    assert "moe: finished by an earlier process" in resumed.out
    assert "cpt: finished by an earlier process" in resumed.out
    after = digests(outputs / "finished")
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"run.json", "config.yaml", "summary.json", "report.html"} and set(after) >= set(before)
    assert summary(outputs / "finished") == figures


def test_a_finished_run_goes_on_when_it_is_given_more_steps(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    shutil.copytree(first, outputs / "extended")
    resumed = go("extended", resume="auto", train__steps=8)
    assert resumed.code == 0, resumed.err
    for stage in ("moe", "cpt"):
        assert rows(outputs / "extended", stage)[:7] == rows(first, stage)
        assert [row["step"] for row in rows(outputs / "extended", stage)[7:]] == [7, 8]
    _, cpt, moe = summary(outputs / "extended")["results"]
    # 8 steps of 4 samples of 16 tokens
    assert cpt["tokens"] == moe["tokens"] == 512
    assert moe["val_loss"] == rows(outputs / "extended", "moe")[-1]["val_loss"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"router__top_k": 3}, ["router.top_k=3", "began with 2"]),
        ({"upcycle__num_experts": 8}, ["upcycle.num_experts=8", "began with 4"]),
        ({"data__path": "other"}, ["data=", "dense="]),
        (
            {"train__global_batch_size": 8, "router__z_coef": 0.5},
            ["train.global_batch_size=8", "router.z_coef"],
        ),
        ({"optim__name": "muon"}, ["optim.name='muon'"]),
    ],
)
def test_what_decides_the_weights_cannot_be_changed(
    changes: dict[str, Any],
    names: list[str],
    go: Callable[..., Ended],
    outputs: Path,
    tmp_path: Path,
) -> None:
    if not (outputs / "kept").exists():
        assert go("kept", StopAt("moe", 1)).code == 130
    before = digests(outputs / "kept")
    if "data__path" in changes:
        changes = {"data__path": write_text(tmp_path / "text", seed=1)}
    refused = go("kept", resume="auto", **changes)
    assert refused.code == 2
    for name in names:
        assert name in refused.err
    after = digests(outputs / "kept")
    assert {name for name in before if before[name] != after[name]} <= {"run.json"}


def test_what_does_not_decide_them_can_be_changed(go: Callable[..., Ended], outputs: Path) -> None:
    assert go("longer", StopAt("moe", 1)).code == 130
    refused = go("longer", resume="auto", train__steps=1, optim__schedule__warmup_steps=0)
    assert refused.code == 2 and "train.steps=1: the checkpoint that moe goes on from" in refused.err
    (outputs / "longer" / "metrics.jsonl").unlink()
    resumed = go("longer", resume="auto", train__steps=8, train__eval_every=0, optim__lr=5e-4)
    assert resumed.code == 0, resumed.err
    assert "other options than it began with" in resumed.out and "optim.lr=0.0005 (was 0.001)" in resumed.out
    assert "its metrics.jsonl is gone" in resumed.out
    assert rows(outputs / "longer", "moe")[-1]["step"] == 8


def test_a_checkpoint_starts_a_new_run(go: Callable[..., Ended], outputs: Path, first: Path) -> None:
    origin = first / "checkpoints" / "step-00000004"
    forked = go("forked", resume=origin)
    assert forked.code == 0, forked.err
    assert f"moe: going on from {origin}" in forked.out
    assert rows(outputs / "forked", "moe") == rows(first, "moe")[5:]
    assert rows(outputs / "forked", "cpt") == rows(first, "cpt")
    same_results(outputs / "forked", first)


def test_a_new_run_from_a_checkpoint_that_was_killed_at_once_goes_on_from_there(
    go: Callable[..., Ended], outputs: Path, first: Path
) -> None:
    origin = first / "checkpoints" / "step-00000004"
    assert go("forked-killed", StopAt("moe", 5), resume=origin).code == 130
    (outputs / "forked-killed" / "summary.json").unlink()
    shutil.rmtree(outputs / "forked-killed" / "checkpoints")
    resumed = go("forked-killed", resume="auto")
    assert resumed.code == 0, resumed.err
    assert f"moe: going on from {origin}" in resumed.out
    assert rows(outputs / "forked-killed", "moe") == rows(first, "moe")[5:]


def test_a_new_run_from_a_damaged_checkpoint_is_refused(
    go: Callable[..., Ended], outputs: Path, first: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "run" / "checkpoints" / "step-00000004"
    shutil.copytree(first / "checkpoints" / "step-00000004", damaged)
    file = damaged / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused = go("from-damaged", resume=damaged)
    assert refused.code == 2
    assert str(file) in refused.err


def test_the_name_of_a_run_cannot_be_taken_twice(go: Callable[..., Ended], first: Path) -> None:
    before = digests(first)
    refused = go("first")
    assert refused.code == 2
    assert "run.name='first'" in refused.err and "resume=auto" in refused.err
    refused = go("first", resume=first / "checkpoints" / "step-00000004")
    assert refused.code == 2
    assert "holds a run already" in refused.err
    assert digests(first) == before


def test_dropout_goes_on_exactly_as_well(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The random state is part of the checkpoint, and every leg starts from that of the seed.
    options = {
        "dense": make_checkpoint("gpt2"),
        "data.path": write_text(tmp_path / "text"),
        "compare.cpt": True,
        "train.steps": 4,
    }
    assert job(tmp_path, options | {"run.name": "straight"}).code == 0
    straight = tmp_path / "outputs" / "straight"
    for stage, step in (("moe", 1), ("cpt", 1)):
        name = f"stopped-{stage}"
        assert job(tmp_path, options | {"run.name": name}, StopAt(stage, step)).code == 130
        if stage == "cpt":  # and the baseline starts anew, in a process that has not trained the mixture
            shutil.rmtree(tmp_path / "outputs" / name / "cpt")
        assert job(tmp_path, options | {"run.name": name, "resume": "auto"}).code == 0
        same_training(tmp_path / "outputs" / name, straight)
