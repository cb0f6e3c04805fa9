"""Sweeps: what is run, where, and what is said of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe.errors import ConfigError
from recipes.jobs import sweep
from recipes.jobs.multirun import SUMMARY, plan_runs, run_sweep
from recipes.launch import main
from tests.grid import each
from tests.paths import ROOT
from tests.patience import patience

UPCYCLE = "+recipe=upcycle"
# Stands in for a run: it fails under router=sigmoid, leaves a damaged summary under router=hash, and waits to
# be stopped under router=ssr.
PROGRAM = """
import json, pathlib, signal, sys, time
given = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(given["output_dir"].strip('"'), given["run.name"].strip('"'))
folder.mkdir(parents=True)
if given["router"] == "sigmoid":
    sys.exit(1)
if given["router"] == "ssr":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    (folder / "waits").touch()
    time.sleep(600)
if given["router"] == "hash":
    (folder / "summary.json").write_text("{")
    sys.exit()
loss = float(given["seed"])
(folder / "summary.json").write_text(json.dumps({"results": [{"model": "moe", "val_loss": loss}]}))
"""


# Of the job of `PROGRAM`, whose finished runs have one model.
PASSES = SimpleNamespace(
    job=SimpleNamespace(models=lambda config: ("moe",)), config=None, values=None, check_models=lambda: None
)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are `PROGRAM`, and pass every check."""
    monkeypatch.setattr(sweep, "TRAIN", ("-c", PROGRAM))
    monkeypatch.setattr(sweep, "check_command", lambda *given: PASSES)


@each(
    "options, swept",
    [
        (["a=1", "b=[1,2]"], [()]),
        (["a=1,2", "b=3,4"], [("a=1", "b=3"), ("a=1", "b=4"), ("a=2", "b=3"), ("a=2", "b=4")]),
        (["train.steps=range(2,8,3)"], [("train.steps=2",), ("train.steps=5",)]),
        (["a=choice([1,2],[3])"], [("a=[1,2]",), ("a=[3]",)]),
        (["+recipe=upcycle,pretrain"], [("+recipe=upcycle",), ("+recipe=pretrain",)]),
        (["upcycle=glob(shared*)"], [("upcycle=shared_dense",), ("upcycle=shared_routed",)]),
        (["b='1,2'"], [()]),
    ],
)
def test_what_is_swept(options: list[str], swept: list[tuple[str, ...]]) -> None:
    assert [run.swept for run in plan_runs(options)] == swept


def test_every_run_has_a_directory(tmp_path: Path) -> None:
    runs = plan_runs(
        [UPCYCLE, "router=topk,sigmoid", "data.path=/x/a.txt,/x/b.txt", f"output_dir={tmp_path}"]
    )
    assert [run.folder.name for run in runs] == [
        "0-topk-x-a.txt",
        "1-topk-x-b.txt",
        "2-sigmoid-x-a.txt",
        "3-sigmoid-x-b.txt",
    ]
    folder = runs[0].folder.parent
    assert folder.parent == tmp_path / "multirun" and re.fullmatch(r"[\d_-]{19}", folder.name)
    assert runs[3].overrides[:3] == (UPCYCLE, "router=sigmoid", "data.path=/x/b.txt")
    assert runs[3].overrides[-2:] == (f'output_dir="{folder}"', 'run.name="3-sigmoid-x-b.txt"')


def test_a_sweep_has_a_name_if_it_is_given_one(tmp_path: Path) -> None:
    place = [UPCYCLE, f"output_dir={tmp_path}", "run.name=mine", "resume=auto"]
    assert plan_runs(["seed=1,2", *place])[1].folder == tmp_path / "mine/1-2"
    assert plan_runs(["seed=1,2", f"hydra.sweep.dir={tmp_path}/s"])[0].folder == tmp_path / "s/0-1"
    with pytest.raises(ConfigError, match="a sweep is gone on with by its name. Set run.name as well."):
        plan_runs([UPCYCLE, "seed=1,2", "resume=auto"])
    with pytest.raises(ConfigError, match="it has no end of values"):
        plan_runs(["seed=interval(1,2)"])
    for name in ("output_dir=a,b", "run.name=a,b", "run.name=${router.name}"):
        with pytest.raises(ConfigError, match="a sweep has one folder"):
            plan_runs([UPCYCLE, name])


def test_all_runs_are_done_and_summed_up(
    tmp_path: Path, program: None, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [UPCYCLE, "router=topk,sigmoid", "seed=3,4", f"output_dir={tmp_path}", "run.name=s"]
    assert run_sweep(given) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"[1/4] router=topk seed=3 -> {tmp_path}/s/0-topk-3"
    assert re.fullmatch(r"0-topk-3: done \(\d+ s\), 3 to go", lines[1])
    assert lines[8:] == [
        "0-topk-3: done: moe 3.0000",
        "1-topk-4: done: moe 4.0000",
        "2-sigmoid-3: FAILED with exit code 1",
        "3-sigmoid-4: FAILED with exit code 1",
        f"summary: {tmp_path}/s/{SUMMARY}",
    ]
    rows = json.loads((tmp_path / "s" / SUMMARY).read_text())["runs"]
    assert [row["code"] for row in rows] == [0, 0, 1, 1]
    assert rows[1]["swept"] == ["router=topk", "seed=4"] and rows[1]["results"][0]["val_loss"] == 4.0


def test_what_is_done_is_not_run_again(
    tmp_path: Path, program: None, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [UPCYCLE, "router=topk,sigmoid", "seed=3", f"output_dir={tmp_path}", "run.name=s"]
    assert run_sweep(given) == 1
    shutil.rmtree(tmp_path / "s/1-sigmoid")
    capfd.readouterr()
    assert run_sweep([*given, "resume=auto"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["[1/2] 0-topk: done already", f"[2/2] router=sigmoid -> {tmp_path}/s/1-sigmoid"]
    assert lines[3:5] == ["0-topk: done: moe 3.0000", "1-sigmoid: FAILED with exit code 1"]


def test_a_run_whose_export_failed_is_not_done(tmp_path: Path) -> None:
    run = sweep.SweptRun(folder=tmp_path, overrides=(), models=("moe",))
    summary = {"results": [{"model": "moe"}], "export": {"exact": True}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert run.done
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"export": {"failed": "its logits differ"}}))
    assert not run.done


def test_a_run_of_other_options_is_not_done(tmp_path: Path) -> None:
    values = {"resume": "auto", "train": {"steps": 5}}
    run = sweep.SweptRun(folder=tmp_path, overrides=(), models=("moe",), values=values)
    (tmp_path / "summary.json").write_text(json.dumps({"results": [{"model": "moe"}]}))
    assert not run.done  # nobody knows what it was
    (tmp_path / "config.yaml").write_text("resume: none\ntrain: {steps: 5}\n")
    assert run.done
    assert not replace(run, values={**values, "train": {"steps": 6}}).done
    for damaged in ("[1, 2]", "a: [", "", "\x00"):
        (tmp_path / "config.yaml").write_text(damaged)
        assert not run.done, damaged


def test_a_summary_that_cannot_be_read_is_told(
    tmp_path: Path, program: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep([UPCYCLE, "router=hash", "seed=3", f"output_dir={tmp_path}", "run.name=s"]) == 0
    assert "0: done, but its summary.json is not JSON (" in capfd.readouterr().out


def test_ctrl_c_stops_the_run_and_starts_no_other(tmp_path: Path) -> None:
    code = (
        "import sys; from recipes.jobs import multirun, sweep\n"
        "from tests.recipes.jobs.test_multirun import PASSES\n"
        f"sweep.TRAIN = ('-c', {PROGRAM!r}); sweep.check_command = lambda *given: PASSES\n"
        "sys.exit(multirun.run_sweep(sys.argv[1:]))"
    )
    given = [UPCYCLE, "router=ssr,topk", "seed=1", f"output_dir={tmp_path}", "run.name=s"]
    command = [sys.executable, "-c", code, *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + patience(60)
        while not (tmp_path / "s/0-ssr/waits").exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patience(60))
    assert process.returncode == 130
    assert out.splitlines()[2:4] == ["0-ssr: stopped", "1-topk: not started"]


def test_mistakes_of_all_runs_come_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-m", UPCYCLE, "router=topk,topq", "router.top_k=2,9", "seed=0,x", "dense=/none"]
    assert main(given) == 2
    lines = [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == len(set(lines))
    named = {line.partition(":")[0] for line in lines}
    assert {"router='topq'", "seed='x'", "router.top_k=9", "dense='/none'"} <= named
    assert not list(tmp_path.iterdir())


def test_a_comma_without_the_flag_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([UPCYCLE, "router=topk,sigmoid"]) == 2
    assert "or add -m for a run of each" in capsys.readouterr().err


@each("flags", [["-m"], ["--nproc", "2"]])
def test_ranks_of_torchrun_start_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main([*flags, UPCYCLE]) == 2
    assert "torchrun has started the ranks already" in capsys.readouterr().err
