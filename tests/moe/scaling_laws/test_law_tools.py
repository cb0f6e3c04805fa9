"""The commands: from a table to a fit, a figure and a plan; and how they say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.errors import UserError
from moe.scaling_laws import laws
from moe.scaling_laws.columns import Runs
from tests.forked_commands import run_module
from tests.moe.scaling_laws.grids import grid, noisy_runs
from tools import fit_laws, plan_upcycle

CHECKPOINT = ["--dense-params", "1e9", "--dense-tokens", "1e11"]


def write_csv(path: Path, runs: Runs) -> Path:
    """A table with one column more than is known."""
    names = list(runs.columns)
    lines = [",".join([*names, "note"])]
    lines += [
        ",".join([f"{runs.columns[name][i]:.10g}" for name in names] + ["x"]) for i in range(runs.count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make(folder: Path, law_name: str, preset: str, columns: dict[str, Any], file: str) -> Path:
    """Fits a law to runs that a published one generates, and keeps the fit."""
    law = laws()[law_name]
    runs = noisy_runs(law, dict(law.preset(preset).coefficients), columns, 1e-4)
    table = write_csv(folder / f"{file}.csv", runs)
    out = folder / f"{file}.json"
    flags = ["--bootstrap", "20", "--starts", "16", "--json", str(out)]
    assert fit_laws.main([str(table), "--law", law_name, *flags]) == 0
    return out


def test_from_runs_to_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, tokens = np.geomspace(3e7, 1e9, 4), np.geomspace(2e9, 2e11, 4)
    plane = grid(params=sizes, tokens=tokens)
    space = grid(dense_params=sizes, dense_tokens=tokens, tokens=tokens)
    fits = [
        make(tmp_path, "liew", "liew-2025", space, "upcycled"),
        make(tmp_path, "chinchilla", "liew-2025-moe", plane, "scratch"),
        make(tmp_path, "chinchilla", "liew-2025-dense", plane, "dense"),
    ]
    said = capsys.readouterr().out
    assert "ignored: note" in said and "64 runs of" in said and "(20 bootstraps)" in said
    record = json.loads(fits[0].read_text())
    assert record["law"] == "liew" and len(record["draws"]["A"]) == 20 and record["runs"]["count"] == 64
    flags = ["--upcycle-fit", str(fits[0]), "--scratch-fit", str(fits[1]), "--dense-fit", str(fits[2])]
    picture = tmp_path / "plan.png"
    more = ["--budget-tokens", "2e10", "--json", "-", "--figure", str(picture)]
    assert plan_upcycle.main([*CHECKPOINT, *flags, *more]) == 0
    shown = capsys.readouterr()
    plan = json.loads(shown.out)
    assert plan["best"] == "upcycle" and "upcycle: predicted loss" in shown.err
    assert all(outcome["interval"] for outcome in plan["outcomes"]) and plan["chance"] is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_published_plan_has_nulls_where_nothing_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*CHECKPOINT, "--law", "liew", "--budget-tokens", "5e10"]
    picture = tmp_path / "plan.png"
    assert plan_upcycle.main([*flags, "--json", str(tmp_path / "plan.json"), "--figure", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "Too close to call" in shown and "unknown" in shown and "spread" not in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [outcome["interval"] for outcome in plan["outcomes"]] == [None] * 3
    assert plan["chance"] is None and plan["upcycle_against_scratch"]["tokens"] == pytest.approx(
        5.06e10, rel=0.01
    )
    assert picture.stat().st_size > 10_000


def test_a_fit_is_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = laws()["chinchilla"]
    columns = grid(params=np.geomspace(3e7, 1e9, 4), tokens=np.geomspace(2e9, 2e11, 4))
    runs = noisy_runs(law, dict(law.preset("hoffmann-2022").coefficients), columns, 1e-3)
    table, picture = write_csv(tmp_path / "runs.csv", runs), tmp_path / "new" / "fit.png"
    flags = ["--law", "chinchilla", "--bootstrap", "0", "--starts", "16", "--json", "-"]
    assert fit_laws.main([str(table), *flags, "--figure", str(picture)]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert record["intervals"] is None and record["draws"]["A"] == [] and "no bootstrap" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_list_names_every_law_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_laws.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for law in laws().values():
        assert f"{law.name}: {law.formula}" in shown
        assert all(f"preset {preset.name}:" in shown for preset in law.presets)


def test_flags_are_checked_all_at_once(tmp_path: Path) -> None:
    flags = ["--law", "kaplan", "--bootstrap", "3", "--level", "2", "--delta", "0", "--starts", "1"]
    with pytest.raises(UserError) as caught:
        fit_laws.main([*flags, "--seed", "-1", "--json", str(tmp_path), "--figure", "a.pdf"])
    assert [mistake.path for mistake in caught.value.mistakes] == [
        *(
            "--json",
            "--figure",
            "RUNS.csv",
            "--law",
            "--bootstrap",
            "--level",
            "--delta",
            "--starts",
            "--seed",
        )
    ]


def test_fits_that_cannot_be_used(tmp_path: Path) -> None:
    law = laws()["chinchilla"]
    good = {
        "law": "chinchilla",
        "coefficients": dict(law.presets[0].coefficients),
        "draws": {name: [] for name in law.names},
        "ranges": {"params": [1e7, 1e9], "tokens": [1e9, 1e11]},
        "level": 0.95,
    }
    broken: list[tuple[Any, str]] = [
        ([1], "it is no fit of a law"),
        ({"law": "kaplan"}, "it is no fit of a law"),
        ({**good, "coefficients": {"A": 1.0}}, "coefficients must hold"),
        ({**good, "draws": {**good["draws"], "A": [1.0]}}, "draws must hold"),
        ({**good, "ranges": {"params": [1.0]}}, "ranges must hold"),
        ({**good, "level": 95}, "level must be"),
    ]
    for record, said in broken:
        path = tmp_path / "fit.json"
        path.write_text(json.dumps(record))
        with pytest.raises(UserError) as caught:
            plan_upcycle.main([*CHECKPOINT, "--budget-tokens", "1e10", "--dense-fit", str(path)])
        assert said in str(caught.value)
    path.write_text("{")
    flags = ["--dense-fit", str(path), "--scratch-fit", str(tmp_path / "none.json"), "--law", "apple"]
    with pytest.raises(UserError) as caught:
        plan_upcycle.main([*CHECKPOINT, "--budget-tokens", "1e10", *flags])
    text = str(caught.value)
    for said in ("it is not JSON", "cannot be read", "do not compare", "no published laws of this name"):
        assert said in text


def test_the_command_ends_with_2_on_a_users_mistake(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("loss,params\n3,1e8\n-2,1e9\n")
    done = run_module("tools.fit_laws", str(table), "--law", "chinchilla")
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert "runs.csv:3='-2': loss: it must be more than 0." in done.err
