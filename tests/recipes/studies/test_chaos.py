"""Ranks are killed, and training goes on by itself; the long form is ``python -m tools.chaos --kills 50``."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.studies.chaos.chaos_settings import ChaosSettings
from recipes.studies.chaos.experiment import passed, run_chaos
from recipes.studies.chaos.moments import draw_moments
from tests.forked_python import interpreter
from tests.patience import patience
from tests.recipes.jobs import job_runs
from tests.recipes.jobs.job_runs import write_text


@pytest.mark.distributed
@pytest.mark.slow
def test_two_kills_one_of_them_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", interpreter(tmp_path))
    settings = ChaosSettings(
        folder=tmp_path,
        kills=2,
        steps=60,
        save_every=5,
        seed=14,
        program=[job_runs.__file__],
        patience_s=patience(180.0),
        options=[f"data.path={write_text(tmp_path / 'text')}", "train.async_save=true"],
    )
    assert [moment.kind for moment in draw_moments(settings)] == ["anywhere", "saves"]
    lines: list[str] = []
    found = run_chaos(settings, lines.append)
    assert passed(found), (found, lines)
    assert found["kills"] == found["recoveries"] == 2 and len(lines) == 3
    assert found["recovery_median_s"] is not None
    # At most what lies between two saves, and what was done while the second of them was written.
    assert found["lost_steps_max"] <= 2 * settings.save_every
    own = found["own_figures"]
    assert own["processes"] == 3
