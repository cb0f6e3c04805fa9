"""The benchmark of saves: what it counts, and what its command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe.errors import ConfigError
from recipes.runtime import safetensors_codec
from recipes.studies.benchmarks.saves import (
    ASYNC,
    NONE,
    SYNC,
    WAYS,
    SaveFigures,
    SaveShape,
    measure_saves,
)
from recipes.studies.chaos.slow_disk import slow_down
from tools import bench_save, chaos

SHAPE = SaveShape(width=16, layers=2, batch=4, steps=2)


def test_every_rival_is_timed_and_its_checkpoints_are_what_was_saved(tmp_path: Path) -> None:
    lines: list[str] = []
    found, size = measure_saves(SHAPE, 2, tmp_path, lines.append)
    # Two layers of 16 x 16 weights and 16 biases in fp32: themselves, two moments and a step count each.
    assert size == 4 * (3 * 2 * (16 * 16 + 16) + 4)
    assert len(lines) == 2 and all(way in lines[0] for way in WAYS)
    assert [len(found[way].steps) for way in WAYS] == [2, 2, 2]
    assert found[NONE].stalls == found[NONE].saves == []
    for way in (SYNC, ASYNC):
        assert len(found[way].stalls) == len(found[way].saves) == 2
        assert len(list((tmp_path / way).glob("step-*"))) == 1


def test_medians_and_deciles_by_hand() -> None:
    found = SaveFigures(steps=[float(i) for i in range(1, 12)], stalls=[1.0, 5.0, 2.0], saves=[4.0]).as_dict()
    assert (found["step_s"], found["step_p10_s"], found["step_p90_s"]) == (6.0, 2.0, 10.0)
    assert (found["stall_s"], found["stall_max_s"], found["save_s"]) == (2.0, 5.0, 4.0)


def test_a_simulated_disk_is_slow_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, slept = [], []
    monkeypatch.setattr(safetensors_codec, "append", safetensors_codec.append)  # put back behind the test
    # By this clock writing itself takes no time.
    clock = SimpleNamespace(perf_counter=lambda: 0.0, sleep=slept.append)
    monkeypatch.setattr("recipes.studies.chaos.slow_disk.time", clock)
    for _ in range(2):
        with (tmp_path / "file").open("wb") as file:
            crc = safetensors_codec.append(file, memoryview(bytes(range(256)) * 1024), 0)
        written.append((crc, (tmp_path / "file").read_bytes()))
        slow_down(2.0)
    assert written[0] == written[1]
    assert sum(slept) == pytest.approx(0.25 / 2.0)  # 256 KiB at 2 MiB a second


def test_commands_refuse_all_mistakes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_save", "--rounds", "0", "--threads", "0", "--folder", "nowhere"])
    with pytest.raises(ConfigError) as caught:
        bench_save.main()
    assert [m.path for m in caught.value.mistakes] == ["--rounds", "--threads", "--folder"]
    arguments = ["--kills", "0", "--steps", "5", "--save-every", "6", "--disk-mib-s", "-1", "router"]
    monkeypatch.setattr("sys.argv", ["chaos", *arguments, "--json", str(tmp_path)])
    with pytest.raises(ConfigError) as caught:
        chaos.main()
    named = {mistake.path for mistake in caught.value.mistakes}
    assert named == {"--json", "--kills", "--disk-mib-s", "--save-every", "OPTION=VALUE"}


def test_the_command_prints_a_table_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--width", "16", "--layers", "1", "--batch", "2", "--steps", "1", "--rounds", "1"]
    target = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["bench_save", *sizes, "--json", str(target)])
    assert bench_save.main() == 0
    assert "the disk as it is" in capsys.readouterr().out
    figures = json.loads(target.read_text())
    assert set(figures["rivals"]) == set(WAYS) and figures["simulated_disk_mib_s"] is None
