"""A run on a blend: losses of each source, the same after a stop and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import StopAt, job, process, rows, same_training, write_text


@pytest.mark.slow
@pytest.mark.distributed
def test_a_blend_from_start_to_end(workplace: Path, text: str, spread_options: dict[str, Any]) -> None:
    other = write_text(workplace / "other", seed=1, suffix="jsonl")
    blend = f"[{{path:'{text}',weight:3,name:words}},{{path:'{other}',weight:1,name:more}}]"
    options = spread_options | {"data.path": None, "data.blend": blend, "data.text_key": "body"}
    options |= {"train.steps": 4, "train.eval_every": 4}
    runs = workplace / "outputs"
    whole = job(workplace, options | {"run.name": "blend"})
    assert whole.code == 0, whole.err
    assert "data: words: 75.00% of the samples; " in whole.out
    wanted = rows(runs / "blend", "moe")
    for row in wanted[:: len(wanted) - 1]:
        mean = 0.75 * row["val_loss/words"] + 0.25 * row["val_loss/more"]
        assert row["val_loss"] == pytest.approx(mean) and row["val_loss/words"] != row["val_loss/more"]
    assert all(row["blend/words"] + row["blend/more"] == 1 for row in wanted[1:])
    assert (runs / "blend" / "summary.json").exists()

    stopped = job(workplace, options | {"run.name": "blend-stopped"}, StopAt("moe", 1))
    assert stopped.code == 130, stopped.err
    resumed = job(workplace, options | {"run.name": "blend-stopped", "resume": "auto"})
    assert resumed.code == 0, resumed.err
    same_training(runs / "blend-stopped", runs / "blend", ("moe",))

    pair = process(workplace, options | {"run.name": "blend-pair"}, ranks=2)
    assert pair.code == 0, pair.err
    for row, same in zip(rows(runs / "blend-pair", "moe"), wanted, strict=True):
        for name in {"loss", "val_loss", "val_loss/words", "val_loss/more", "blend/words"} & same.keys():
            assert row[name] == pytest.approx(same[name], rel=1e-4), (row["step"], name)

    more = blend.replace("weight:1", "weight:1,max_epochs:0.001")
    refused = job(workplace, options | {"data.blend": more, "run.name": "blend-small"})
    assert refused.code == 2
    assert "data.blend[1].max_epochs=0.001: the run takes 0." in refused.err
    changed = job(
        workplace, options | {"data.blend": blend.replace("weight:1", "weight:2"), "resume": runs / "blend"}
    )
    assert changed.code == 2 and "data.blend was" in changed.err, changed.err
    written = json.loads((runs / "blend" / "run.json").read_text())
    assert [Path(path).name for path in written["data_parts"]["files"]].count("text.jsonl") == 1
