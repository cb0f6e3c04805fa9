"""A short run of the whole command, one rank: what it leaves, and what a resume may and may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from recipes.launch import main
from tests.conftest import MakeCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The arguments of a run of two steps on a tiny checkpoint."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    other = tmp_path / "validation.txt"
    other.write_text("every expert is a copy of the dense network\n" * 100)
    return [
        "+recipe=upcycle",
        f"dense={make_checkpoint('llama', num_hidden_layers=1)}",
        f"data.path={text}",
        f"data.validation_path={other}",
        f"output_dir={tmp_path / 'outputs'}",
        f"cache_dir={tmp_path / 'cache'}",
        "data.seq_len=16",
        "upcycle.num_experts=4",
        "train.steps=2",
        "train.global_batch_size=2",
        "train.eval_samples=2",
        "optim.schedule.warmup_steps=0",
        "tracker.mode=disabled",
        "engine.device=cpu",
        "run.name=tiny",
        "resume=auto",
    ]


def test_a_run_and_a_refused_resume(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "outputs" / "tiny"
    assert f"run: {folder}\n" in out
    assert "exact" in out
    for name in ("config.yaml", "run.json", "metrics.jsonl", "summary.json", "report.html", "hf/config.json"):
        assert (folder / name).is_file(), name
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    shown = yaml.safe_load((folder / "config.yaml").read_text())
    assert (shown["train"]["steps"], shown["run"]["name"]) == (2, "tiny")
    assert json.loads((folder / "run.json").read_text())["identity"]["upcycle.num_experts"] == 4
    assert json.loads((folder / "hf" / "config.json").read_text())["model_type"] == "mixtral"

    # Another number of experts is refused by name, and what the run is told stays as it was.
    assert main([*run, "upcycle.num_experts=8"]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"error: upcycle.num_experts=8: the run in {folder} began with 4. "
        "Set it back to go on, or start a new run with resume=none.\n"
    )
    assert yaml.safe_load((folder / "config.yaml").read_text()) == shown

    # The finished run has nothing more to do, and its folder is not taken by a new one.
    assert main(run) == 0
    assert "moe: finished by an earlier process of this run" in capsys.readouterr().out
    assert main([*run, "resume=none"]) == 2
    assert "run.name='tiny'" in capsys.readouterr().err
