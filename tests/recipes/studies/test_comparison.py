"""The comparison of routers: which runs there are, what they add up to, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import ConfigError
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.studies.comparison.collect_runs import collect
from recipes.studies.comparison.comparison_page import table_rows, text_table, write_page
from recipes.studies.comparison.router_trials import RouterTrial, plan_trials
from recipes.studies.study_page import spread
from tools.compare import main


def finish(trial: RouterTrial, val_loss: float, maxvio: list[float], step_s: float) -> None:
    """Writes what a run that came to its end leaves."""
    trial.folder.mkdir(parents=True)
    row = {"model": "moe", "val_loss": val_loss, "active_params": 7}
    (trial.folder / "summary.json").write_text(json.dumps({"results": [row]}))
    rows = [{"stage": "moe", "step": 0, "val_loss": 9.0}]
    rows += [
        {"stage": "moe", "step": i + 1, "loss": 1.0, "router/maxvio": value, "step_s": step_s}
        for i, value in enumerate(maxvio)
    ]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def trials(tmp_path: Path) -> list[RouterTrial]:
    """Two seeds of two routers; the second seed of ssr has failed."""
    planned = plan_trials(tmp_path, ["topk", "ssr"], 2)
    by_name = {trial.folder.name: trial for trial in planned}
    # Twenty steps: the last tenth are two, and their mean is 3.
    finish(by_name["topk-s0"], 2.0, [0.0] * 18 + [2.0, 4.0], 0.5)
    finish(by_name["topk-s1"], 4.0, [0.0] * 18 + [2.0, 4.0], 0.5)
    finish(by_name["ssr-s0"], 2.5, [1.0] * 20, 0.6)
    return planned


def test_seed_by_seed(tmp_path: Path) -> None:
    planned = plan_trials(tmp_path, ["topk", "ssr"], 2)
    assert [(trial.router, trial.seed) for trial in planned] == [
        ("topk", 0), ("ssr", 0), ("topk", 1), ("ssr", 1)
    ]  # fmt: skip
    assert not any(trial.done for trial in planned)


def test_a_trial_varies_router_and_seed_alone(tmp_path: Path) -> None:
    one, other = plan_trials(tmp_path, ["topk"], 2, ["train.steps=3"])
    first, second = (parse_config(compose_config(trial.overrides)) for trial in (one, other))
    assert (first.seed, second.seed) == (0, 1)
    assert first.data == second.data
    assert first.model == second.model
    assert first.train.steps == 3
    assert first.resume == "auto"


def test_means_and_spread(trials: list[RouterTrial]) -> None:
    ssr, topk = collect(trials)
    assert (ssr.router, ssr.seeds, ssr.failed) == ("ssr", 1, 1)
    assert (topk.router, topk.seeds, topk.failed) == ("topk", 2, 0)
    assert topk.val_loss == spread([2.0, 4.0])
    # Mean 3, deviation sqrt((1 + 1) / 1).
    assert topk.val_loss is not None
    assert topk.val_loss.mean == 3.0
    assert topk.val_loss.deviation == pytest.approx(2**0.5)
    assert topk.figures["maxvio"].mean == 3.0
    assert ssr.val_loss is not None
    assert ssr.val_loss.deviation is None


@pytest.mark.usefixtures("rendered")
def test_the_page(trials: list[RouterTrial], tmp_path: Path) -> None:
    results = collect(trials)
    cells = {row[0]: row for row in table_rows(results)}
    assert cells["ssr"][1] == "1 (1 not done)"
    assert cells["topk"][2] == "3.0000 +-1.4142"
    assert cells["ssr"][7] == "1.20"  # 0.6 s over 0.5 s
    assert "ssr" in text_table(results)
    page = write_page(tmp_path, results, "a <test>")
    text = page.read_text()
    assert "a &lt;test&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert json.loads((tmp_path / "comparison.json").read_text())["routers"][1]["seeds"] == 2


def test_nothing_is_done_yet(tmp_path: Path) -> None:
    results = collect(plan_trials(tmp_path, ["topk"], 1))
    assert table_rows(results)[0][2] == ""
    assert write_page(tmp_path, results, "none").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--routers", "topk,foo,bar"], r"--routers='foo': there is no such router(.|\n)*--routers='bar'"),
        (["--routers", ","], "--routers=',': the list is empty"),
        (["--seeds", "0", "--ranks", "0"], r"--seeds=0(.|\n)*--ranks=0"),
        (["routers=[topk,foo]"], "--routers='foo': there is no such router"),
    ],
)
def test_mistakes_come_before_the_first_run(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *given])
    with pytest.raises(ConfigError, match=message):
        main()
