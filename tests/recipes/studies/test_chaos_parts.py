"""What the chaos tool draws, sees and compares, worked by hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.studies.chaos.chaos_settings import AIMS, Aim, ChaosSettings
from recipes.studies.chaos.experiment import passed
from recipes.studies.chaos.killer import Kill
from recipes.studies.chaos.moments import draw_moments
from recipes.studies.chaos.run_watch import RunWatch
from recipes.studies.chaos.verdict import difference, figures, percentile

SETTINGS = ChaosSettings(Path("nowhere"), kills=600, ranks=3, steps=1000)


@pytest.mark.parametrize("aim", AIMS)
def test_moments_are_uniform_and_the_same_again(aim: Aim) -> None:
    moments = draw_moments(replace(SETTINGS, aim=aim))
    assert moments == draw_moments(replace(SETTINGS, aim=aim))
    assert moments != draw_moments(replace(SETTINGS, aim=aim, seed=1))
    assert [moment.step for moment in moments] == sorted(moment.step for moment in moments)
    # 600 draws in four quarters: 150 each, with a deviation of 10.6.
    quarters = [sum(m.step // 250 == quarter for m in moments) for quarter in range(4)]
    assert all(abs(count - 150) < 60 for count in quarters)
    ranks = [sum(m.rank == rank for m in moments) for rank in range(3)]
    assert all(abs(count - 200) < 60 for count in ranks)
    kinds = {kind: sum(m.kind == kind for m in moments) for kind in ("anywhere", "saves", "start")}
    if aim == "mixed":
        assert all(abs(kinds[kind] - share) < 60 for kind, share in zip(kinds, (300, 200, 100), strict=True))
    else:
        assert kinds[aim] >= 599  # the first is never at a start
    assert moments[0].kind != "start"


def test_options_win_and_a_run_without_a_name_stays_so() -> None:
    found = replace(SETTINGS, options=["train.steps=7", "router=deepseek_v3"]).overrides(None)
    assert "train.steps=7" in found and "train.steps=1000" not in found and "router=deepseek_v3" in found
    assert not [option for option in found if option.startswith(("run.name", "resume"))]
    assert "run.name=a" in SETTINGS.overrides("a")


def write_rows(run_dir: Path, rows: list[dict[str, Any]], end: str = "") -> None:
    run_dir.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text + end)
    (run_dir / "load.jsonl").write_text("{}\n")


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "stage": "moe",
        "step": step,
        "loss": 1.0 / (step + 1),
        "time": 100.0 + step,
        "step_s": 1.0,
        **more,
    }


def test_what_is_seen_of_a_run(tmp_path: Path) -> None:
    watch = RunWatch(tmp_path)
    assert watch.newest_row() is None and watch.saving(0.0) is None and watch.newest_checkpoint() == 0
    write_rows(tmp_path, [{"stage": "moe", "step": 0, "val_loss": 2.0, "time": 100.0}])
    assert watch.newest_row() is None
    write_rows(tmp_path, [row(1), row(2)], end='{"stage": "moe", "st')
    newest = watch.newest_row()
    assert newest is not None and newest["step"] == 2
    first = watch.first_row(101.5)
    assert first is not None and first["step"] == 2 and watch.first_row(102.0) is None

    for name, complete in (("step-00000003", True), ("step-00000007", False), (".tmp-step-00000009", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / ".tmp-deleted-step-00000001").mkdir()
    assert watch.newest_checkpoint() == 3
    now = 1e9
    os.utime(tmp_path / "checkpoints" / ".tmp-step-00000009", (now, now))
    assert watch.saving(now - 1) == ".tmp-step-00000009"
    assert watch.saving(now + 1) is None  # left by a process that is gone


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([row(1), row(2)], None),
        ([row(1, time=7.0, step_s=9.0, save_stall_s=1.0, goodput=0.5), row(2)], None),
        ([row(1)], "1 rows instead of 2"),
        ([row(1), row(2, loss=0.3333333333333334)], "moe step 2: loss is 0.3333333333333334 instead of"),
        ([row(1), row(2, aux=0.0)], "moe step 2: aux is 0.0 instead of None"),
    ],
)
def test_the_last_bit_counts_and_times_do_not(
    tmp_path: Path, changed: list[dict[str, Any]], told: str | None
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_rows(theirs, [row(1), row(2)])
    write_rows(ours, changed)
    found = difference(ours, theirs)
    assert found is None if told is None else found is not None and told in found


def test_weights_and_loads_are_compared(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        write_rows(tmp_path / name, [row(1)])
        (tmp_path / name / "hf").mkdir()
        (tmp_path / name / "hf" / "model.safetensors").write_bytes(b"weights")
    assert difference(tmp_path / "ours", tmp_path / "theirs") is None
    (tmp_path / "ours" / "hf" / "model.safetensors").write_bytes(b"weighty")
    assert difference(tmp_path / "ours", tmp_path / "theirs") == "hf/model.safetensors differs"
    (tmp_path / "ours" / "load.jsonl").unlink()
    assert difference(tmp_path / "ours", tmp_path / "theirs") == "load.jsonl differs"


def test_figures_by_hand() -> None:
    kills = [
        Kill("anywhere", 0, 25, 0.0, False, newest=20, resumed_from=20, recovery_s=10.0, lost_steps=5),
        Kill("saves", 1, 41, 0.0, True, newest=20, resumed_from=20, lost_steps=21),
        Kill("start", 1, 41, 0.0, False, newest=20, resumed_from=20, recovery_s=30.0),
        Kill("saves", 0, 60, 0.0, True, newest=60, resumed_from=40, recovery_s=20.0, lost_steps=20),
    ]
    found = figures(kills)
    assert (found["kills"], found["recoveries"], found["kills_before_recovery"]) == (4, 3, 1)
    assert (found["recovery_median_s"], found["recovery_p90_s"], found["recovery_max_s"]) == (
        20.0,
        30.0,
        30.0,
    )
    assert (found["lost_steps"], found["lost_steps_max"]) == (46, 21)
    assert found["kills_by_aim"] == {"anywhere": 1, "saves": 2, "start": 1}
    assert found["kills_during_a_save"] == 2
    assert found["from_newest_checkpoint"] == 3  # the last went back further than it had to
    ended = found | {"asked_kills": 4, "difference": None, "second_runs": []}
    assert not passed(ended)
    assert passed(ended | {"from_newest_checkpoint": 4})
    assert not passed(ended | {"from_newest_checkpoint": 4, "difference": "moe step 3"})
    assert not passed(ended | {"from_newest_checkpoint": 4, "second_runs": ["upcycle-2"]})
    assert not passed(ended | {"from_newest_checkpoint": 4, "asked_kills": 5})


def test_percentiles_by_hand() -> None:
    assert percentile([], 0.9) is None
    assert percentile([3.0, 1.0, 2.0], 0.9) == 3.0
    assert percentile([float(i) for i in range(1, 11)], 0.9) == 9.0
    assert percentile([float(i) for i in range(1, 21)], 0.9) == 18.0
