"""The grid: which runs there are, what they add up to, tables and figure, and how runs are started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe.errors import ConfigError
from moe.scaling_laws.columns import parse_runs
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.config.sections.upcycle_vs_cpt_config import UpcycleVsCPTConfig
from recipes.jobs.sweep import run_all
from recipes.studies.upcycle_vs_cpt.arms_page import cost_rows, loss_rows, run_table, text_tables, write_page
from recipes.studies.upcycle_vs_cpt.arms_trials import ArmsTrial, keep_options, options_of, plan_trials
from recipes.studies.upcycle_vs_cpt.collect_arms import READINGS, collect
from tests.recipes.studies.invented_runs import LENGTHS, finish_all, grid
from tools.upcycle_vs_cpt import main


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the end of a run noticed at once."""
    monkeypatch.setattr("recipes.jobs.sweep._POLL_S", 0.01)


def test_seed_by_seed(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 2)
    assert [trial.folder.name for trial in trials] == [
        "d30-s0", "d60-s0", "scratch-30-60-s0", "d30-s1", "d60-s1", "scratch-30-60-s1"
    ]  # fmt: skip
    assert not any(trial.done or trial.prepared for trial in trials)


def test_a_trial_varies_weights_alone(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 2, ["train.steps=3"])
    configs = [parse_config(compose_config(trial.overrides)) for trial in trials]
    assert [c.model.steps for c in configs] == [30, 60, 0, 30, 60, 0]
    assert [c.seed for c in configs] == [c.model.seed for c in configs] == [0, 0, 0, 1, 1, 1]
    assert all(c.data == configs[0].data and c.train.steps == 3 for c in configs)
    assert [c.section(UpcycleVsCPTConfig).sunk_steps for c in configs[:3]] == [[30], [60], [30, 60]]
    assert {c.optim.schedule.kind for c in configs} == {"wsd"}


def test_a_checkpoint_for_every_length(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 1, ["dense=/runs/step-{length}"])
    given = [trial.overrides[1] for trial in trials]
    assert given == ["dense=/runs/step-30", "dense=/runs/step-60", "dense=/runs/step-60"]


def test_runs_of_other_options_are_not_mixed(tmp_path: Path) -> None:
    assert options_of(tmp_path / "grid") is None
    keep_options(tmp_path / "grid", ["train.steps=3", "optim.lr=1e-3"])
    keep_options(tmp_path / "grid", ["optim.lr=1e-3", "train.steps=3"])
    with pytest.raises(ConfigError, match="began with"):
        keep_options(tmp_path / "grid", ["train.steps=4"])
    assert options_of(tmp_path / "grid") == ["optim.lr=1e-3", "train.steps=3"]


def test_a_run_without_all_its_stages_is_not_done(tmp_path: Path) -> None:
    trials = grid(tmp_path, 1)
    assert all(trial.done and trial.prepared for trial in trials)
    path = trials[0].folder / "summary.json"
    content = json.loads(path.read_text())
    content["results"] = [row for row in content["results"] if row["model"] != "cpt_tokens"]
    path.write_text(json.dumps(content))
    assert not trials[0].done


def test_readings_by_hand(tmp_path: Path) -> None:
    found = collect(grid(tmp_path))
    assert found.lengths == [30, 60] and not found.missing
    cell = found.cells[0]
    assert (cell.length, cell.seed) == (30, 0)
    assert {name: at.loss for name, at in cell.readings.items()} == {
        "dense": 6.0, "cpt_tokens": 4.75, "cpt_flops": 4.25, "moe": 4.5,
        "scratch_free": 5.5, "scratch_total": 5.0,
    }  # fmt: skip
    # 200 tokens at 3 FLOPs, and as many for 300 tokens at 2.
    assert cell.readings["moe"].flops == cell.readings["cpt_flops"].flops == 600
    # 30 dense steps of 10 tokens at 2 FLOPs; from scratch 40 steps of 10 at 3 are both together.
    assert cell.sunk_flops == 600
    assert cell.readings["scratch_total"].flops == 1200
    # The longer dense model, against the longest run from scratch.
    assert found.of(60)[0].readings["scratch_total"].loss == 4.5
    assert found.of(60)[0].readings["scratch_total"].flops == 600 + found.of(60)[0].sunk_flops


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    found = collect(grid(tmp_path))
    loss, behind = found.loss(30, "cpt_tokens"), found.behind(30, "cpt_tokens")
    assert loss is not None and behind is not None
    # 4.75 and 6.25; behind 0.25 and 0.75, whose deviation is sqrt(2) / 4.
    assert (loss.mean, behind.values) == (5.5, (0.25, 0.75))
    assert behind.deviation == pytest.approx(2**0.5 / 4)
    equal = found.behind(60, "cpt_flops")
    assert equal is not None and equal.mean == -0.25 and equal.deviation == 0.0


def test_where_the_rate_stays(tmp_path: Path) -> None:
    curve = collect(grid(tmp_path)).cells[0].curves["moe"]
    assert curve.constant == 160 and curve.tokens[-1] == 200


@pytest.mark.usefixtures("rendered")
def test_a_lost_run_takes_no_other_down(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 2)
    finish_all([trial for trial in trials if trial.folder.name not in ("d60-s1", "scratch-30-60-s0")])
    found = collect(trials)
    assert found.missing == ("scratch-30-60-s0", "d60-s1")
    assert [(cell.length, cell.seed) for cell in found.cells] == [(30, 0), (30, 1), (60, 0)]
    assert [len(found.loss(30, name).values) for name in READINGS] == [2, 2, 2, 2, 1, 1]  # type: ignore[union-attr]
    assert found.loss(60, "scratch_total") is None
    text = text_tables(found)
    assert "not there: scratch-30-60-s0, d60-s1" in text
    write_page(tmp_path, found, "options")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_tables(tmp_path: Path) -> None:
    found = collect(grid(tmp_path))
    rows = loss_rows(found)
    assert len(rows) == 2 * len(READINGS)
    assert rows[1] == [
        "30", "dense continued, equal tokens", "200", "0.000", "5.5000 +-1.0607", "+0.5000 +-0.3536", "2"
    ]  # fmt: skip
    assert [row[1] for row in cost_rows(found)] == ["1", "32", "1", "32"]


def test_the_page(tmp_path: Path) -> None:
    page = write_page(tmp_path, collect(grid(tmp_path)), "train.steps=20")
    text = page.read_text()
    assert "train.steps=20" in text and 'src="http' not in text
    content = json.loads((tmp_path / "grid.json").read_text())
    assert len(content["readings"]) == 12 and content["options"] == "train.steps=20"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(("arm", "count"), [("moe", 4), ("cpt", 8), ("scratch", 6)])
def test_the_law_fitter_reads_the_tables(tmp_path: Path, arm: str, count: int) -> None:
    text = run_table(collect(grid(tmp_path)), arm)
    runs = parse_runs(text, "runs.csv")
    assert runs.count == count  # a run from scratch once, though it serves two lengths
    if arm == "cpt":
        # A dense run of what it was trained on before and after: 300 + 200, 300 + 300 and so on.
        assert sorted(set(runs.columns["tokens"])) == [500, 600, 800, 900]
        assert set(runs.columns["params"]) == {100} and "dense_tokens" not in runs.columns


def test_runs_start_alone_until_the_cache_is_filled(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 1)
    started: list[list[str]] = []
    said: list[str] = []
    alive: list[subprocess.Popen[bytes]] = []

    def launch(trial: ArmsTrial) -> subprocess.Popen[bytes]:
        started.append([other.folder.name for other in trials if other.prepared])
        assert sum(process.poll() is None for process in alive) < 2
        code = "import sys, pathlib\np = pathlib.Path(sys.argv[1])\np.mkdir(parents=True)\n"
        code += "(p / 'metrics.jsonl').touch()\nsys.exit(int('d60' in sys.argv[1]))"
        alive.append(subprocess.Popen([sys.executable, "-c", code, str(trial.folder)]))
        return alive[-1]

    end = run_all(trials, launch, said.append, parallel=2)
    assert started[0] == [] and "d30-s0" in started[1] and len(started) == 3
    assert (end.codes, end.exit_code) == ([0, 1, 0], 1)
    assert sum("d60-s0: FAILED with exit code 1 (" in line for line in said) == 1
    assert sum(": done (" in line for line in said) == 2


def test_an_interrupt_asks_the_runs_to_save(tmp_path: Path) -> None:
    trials = plan_trials(tmp_path, LENGTHS, 1)
    started: list[subprocess.Popen[bytes]] = []

    def launch(trial: ArmsTrial) -> subprocess.Popen[bytes]:
        if started:
            os.kill(os.getpid(), signal.SIGTERM)
        trial.folder.mkdir(parents=True)
        (trial.folder / "metrics.jsonl").touch()
        started.append(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]))
        return started[-1]

    end = run_all(trials, launch, lambda line: None, parallel=2)
    # The second was just being started, the third never is.
    assert (end.codes, end.exit_code) == ([-15, -15, None], 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.schedule.kind=cosine"], "Set it to wsd"),
        (["train.eval_every=0"], "branch off"),
        (["train.steps=0"], "nothing to compare"),
        (["upcycle=cmoe", "router=analytical"], "upcycle_vs_cpt.arms=continued"),
        (["dense=/nowhere"], "one checkpoint for 2 lengths"),
        (["--parallel", "0"], "1 or more"),
        (["--lengths", ""], "whole number above 0"),
        (["--lengths", "0,a"], r"'0' is not(.|\n)*'a' is not"),
        (["--seeds", "0"], "--seeds=0"),
        (["train.stepz=3"], "no such option"),
        (["upcycle_vs_cpt.batches=[]"], "Give"),
    ],
)
def test_mistakes_come_before_the_first_run(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "recipes.jobs.sweep.run_all",
        lambda *given: pytest.fail("a run was started"),
    )
    with pytest.raises(ConfigError, match=message):
        main(["--lengths", "60,30,60", "model.warmup_steps=10", *arguments])
    assert not list(tmp_path.iterdir())


def test_only_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--lengths", "30,60", "--seeds", "2", "--json", "figures.json", "--only-page", "--name", "made"]
    assert main(asked) == 1
    grid(tmp_path / "outputs" / "upcycle_vs_cpt" / "made")
    assert main(asked) == 0
    assert "dense continued, equal FLOPs" in capsys.readouterr().out
    assert {cell["length"] for cell in json.loads((tmp_path / "figures.json").read_text())["cells"]} == {
        30,
        60,
    }
