"""The comparison on a table: every router end to end, what is kept, what fails, what is shown."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from moe.errors import ConfigError, DataError
from recipes.studies.study_page import spread
from recipes.studies.tables.generate import Rows, TableConfig, generate
from recipes.studies.tables.table_model import ModelConfig
from recipes.studies.tables.table_page import collect, text_table, write_page
from recipes.studies.tables.table_routers import parse_moes
from recipes.studies.tables.table_runs import (
    Experiment,
    Run,
    check_kept,
    execute_missing,
    final_runs,
    seed_by_seed,
    tuning_runs,
)
from recipes.studies.tables.train_table import FitConfig, train_run
from tools import compare_tables

TABLE = TableConfig(num_rows=1000, num_users=20, num_items=10)
WIDTHS = ModelConfig(id_width=4, code_width=2, num_experts=4, expert_width=3, tower_width=5)
FIT = FitConfig(epochs=2, batch_size=128)
ROUTERS = ["dense", "topk", "hash", "dselect_k", "comet", "comet_plus"]
OTHERS = ["sigmoid", "sinkhorn", "relu", "deepseek_v3:num_groups=2,top_groups=1"]


def experiment(
    folder: Path, specs: list[str], seeds: int = 2, lrs: tuple[float, ...] = (0.01,)
) -> Experiment:
    """A tiny one."""
    moes = parse_moes(specs, WIDTHS, FIT.max_steps(TABLE.split_sizes()["train"]))
    return Experiment(folder, TABLE, WIDTHS, FIT, moes, seeds, lrs)


@pytest.fixture(scope="module")
def splits() -> dict[str, Rows]:
    """A small set."""
    return generate(TABLE)


def made_up(aucs: dict[tuple[str, int, float], float]) -> Any:
    """Stands in for training: AUC by router name, seed and rate."""

    def train(_splits: Any, _table: Any, _model: Any, moe: Any, _fit: Any, seed: int, lr: float) -> Any:
        auc = aucs[moe.router.name, seed, lr]
        figures = {"experts_per_example": 2.0, "load_cv": 0.5, "dead_experts": 1.0, "seconds": 3.0}
        return {"validation_auc": [auc, auc], "test_auc": [auc, auc + 0.1], **figures}

    return train


@pytest.mark.parametrize("spec", ROUTERS + OTHERS)
def test_every_router_end_to_end(spec: str, splits: dict[str, Rows], tmp_path: Path) -> None:
    tiny = experiment(tmp_path, [spec], seeds=1)
    said: list[str] = []
    assert execute_missing(tuning_runs(tiny), splits, said.append) == 0
    (result,) = collect(tiny)
    assert (result.spec, result.seeds, result.missing, result.lr) == (spec, 1, 0, 0.01)
    assert all(0 < value.mean < 1 for value in result.auc.values())
    used = result.figures["experts_per_example"].mean
    assert 0 < used <= 4
    if spec in ("topk", "hash"):
        assert used == 2
    if spec == "dense":
        assert used == 1
    assert math.isfinite(result.figures["load_cv"].mean)
    assert len(said) == 1
    assert not list(tmp_path.rglob("*.error.txt"))


def test_specs() -> None:
    moes = parse_moes(
        ["dense", "comet:gamma=5,top_k=3", "comet_plus", "permuted:search.steps=7", "switch"], WIDTHS, 1000
    )
    dense = moes["dense"]
    # One network of the width of K experts.
    assert (dense.num_experts, dense.expert_width) == (1, 2 * 3)
    comet: Any = moes["comet:gamma=5,top_k=3"].router
    assert (comet.gamma, comet.top_k, comet.entropy_coef) == (5.0, 3, 0.1)
    plus: Any = moes["comet_plus"].router
    # 5% of 1000 steps.
    assert (plus.inner.name, plus.inner.top_k, plus.search.steps) == ("comet", 2, 50)
    own: Any = moes["permuted:search.steps=7"].router
    assert (own.inner.name, own.search.steps) == ("topk", 7)


def test_all_mistakes_in_specs_at_once() -> None:
    wrong = ["foo", "topk:gama=1", "topk:top_k=9", "comet:gamma=-1", "dense:x=1", "topk"]
    with pytest.raises(ConfigError) as caught:
        parse_moes(wrong, WIDTHS, 10)
    assert [m.path.split()[1] for m in caught.value.mistakes] == [f"{spec}:" for spec in wrong[:-1]]
    with pytest.raises(ConfigError, match="empty"):
        parse_moes([], WIDTHS, 10)


def test_the_rate_is_chosen_on_seed_0(splits: dict[str, Rows], tmp_path: Path) -> None:
    tiny = experiment(tmp_path, ["topk", "hash"], lrs=(0.1, 0.2))
    aucs = {("topk", 0, 0.1): 0.6, ("topk", 0, 0.2): 0.7, ("hash", 0, 0.1): 0.5, ("hash", 0, 0.2): 0.4}
    aucs |= {("topk", 1, 0.2): 0.8, ("hash", 1, 0.1): 0.6}
    train, said = made_up(aucs), []
    assert final_runs(tiny, "topk") == []
    assert execute_missing(tuning_runs(tiny), splits, said.append, train) == 0
    assert execute_missing(seed_by_seed(tiny), splits, said.append, train) == 0
    assert len(said) == 6
    topk, hashed = collect(tiny)
    assert (topk.lr, hashed.lr) == (0.2, 0.1)
    assert topk.auc["watched"] == spread([0.7, 0.8])
    # Means over tasks are 0.05 above the first task's; 0.55 - 0.75 and 0.65 - 0.85 differ by 0.2 each.
    assert topk.auc["mean"].values == pytest.approx((0.75, 0.85))
    assert hashed.over_base is not None
    assert hashed.over_base.values == pytest.approx((-0.2, -0.2))
    assert topk.over_base is None
    assert [(run.spec, run.seed) for run in seed_by_seed(tiny)][:2] == [("topk", 0), ("hash", 0)]


def test_what_is_done_is_not_repeated(splits: dict[str, Rows], tmp_path: Path) -> None:
    tiny = experiment(tmp_path, ["topk"], seeds=1)
    assert execute_missing(tuning_runs(tiny), splits, print) == 0
    before = tuning_runs(tiny)[0].path.read_bytes()

    def never(*_: Any) -> Any:
        raise AssertionError("trained again")

    assert execute_missing(tuning_runs(tiny), splits, print, never) == 0
    assert tuning_runs(tiny)[0].path.read_bytes() == before


def test_a_failed_run_takes_no_other_down(splits: dict[str, Rows], tmp_path: Path) -> None:
    tiny = experiment(tmp_path, ["topk", "hash", "comet"], seeds=1)

    def fails(*arguments: Any) -> dict[str, Any]:
        if arguments[3].router.name == "hash":
            raise RuntimeError("out of luck\nand more")
        return train_run(*arguments)

    said: list[str] = []
    assert execute_missing(tuning_runs(tiny), splits, said.append, fails) == 1
    assert "FAILED, RuntimeError: out of luck; see" in said[1]
    run = tuning_runs(tiny)[1]
    assert "out of luck" in run.error_path.read_text()
    results = {result.spec: result for result in collect(tiny)}
    assert [results[spec].seeds for spec in ("topk", "hash", "comet")] == [1, 0, 1]
    assert collect(tiny)[-1].spec == "hash"
    assert "0 (1 not done)" in text_table(collect(tiny))
    page = write_page(tmp_path, collect(tiny), splits["test"].ceilings(), {})
    assert "data:image/png" in page.read_text() and (tmp_path / "tables.png").is_file()
    # The next time only the failed one runs, and its traceback goes.
    assert execute_missing(tuning_runs(tiny), splits, said.append) == 0
    assert len(said) == 4
    assert not run.error_path.exists()


def test_files_of_other_settings_are_refused(splits: dict[str, Rows], tmp_path: Path) -> None:
    tiny = experiment(tmp_path, ["topk", "hash"], seeds=1)
    execute_missing(tuning_runs(tiny), splits, print)
    check_kept(tiny)
    tuning_runs(tiny)[1].path.write_text("{")
    other = dataclasses.replace(tiny, fit=FitConfig(epochs=3))
    with pytest.raises(DataError, match=r"another fit.epochs, fit.batch_size\.(.|\n)*not the file of a run"):
        check_kept(other)


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    tiny = experiment(tmp_path, ["topk"])
    write_page(tmp_path, collect(tiny), (0.9, 0.9), {})
    assert not (tmp_path / "tables.png").exists()
    assert "topk" in text_table(collect(tiny))


def test_specs_make_names_of_files(tmp_path: Path) -> None:
    spec = "comet:gamma=5,top_k=3"
    assert (
        Run(experiment(tmp_path, [spec]), spec, 2, 0.001).path.name == "comet-gamma=5-top_k=3-s2-lr0.001.json"
    )


def call(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_tables", *flags])
    return compare_tables.main()


@pytest.mark.usefixtures("rendered")
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--rows", "1000", "--epochs", "1", "--seeds", "1", "--lrs", "0.01", "--routers", "topk", "hash"]
    assert call(monkeypatch, *flags, "--json", "out.json", "--only-page") == 1
    assert call(monkeypatch, *flags, "--json", "out.json") == 0
    said = capsys.readouterr().out
    assert "the ceiling): watched 0." in said
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [len(router["auc"]["mean"]["values"]) for router in figures["routers"]] == [1, 1]
    assert figures["model"]["num_experts"] == 16
    kept = tmp_path / "outputs" / "tables" / "default"
    assert json.loads((kept / "tables.json").read_text()) == figures
    assert (kept / "tables.png").stat().st_size > 1000


def test_mistakes_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--seeds", "0", "--rows", "5", "--lrs", "-1", "--name", "a/b"]
    with pytest.raises(Exception, match=r"--seeds=0(.|\n)*--rows=5(.|\n)*--lrs(.|\n)*--name='a/b'"):
        call(monkeypatch, *flags)
