"""The tracker: really offline once, and every way in which wandb may fail."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from packaging.version import Version

from recipes.tracking import trackers as tracking
from recipes.tracking.config import TrackerConfig
from recipes.tracking.metrics_log import read_rows
from recipes.tracking.report.colours import DIVERGING_STOPS, load_image
from recipes.tracking.trackers import ExpertLoad, NullTracker, RunLogger, Tracker, start
from tests.patience import patience

LOAD = ExpertLoad([1, 3], [[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see, or use, the account of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


def _row(step: int, stage: str = "moe", **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "tokens": 10 * step, "time": 1.0, "loss": 3.0 - step, **more}


class FakeRun:
    """What the tracker uses of a wandb run."""

    def __init__(self, fail: str = "") -> None:
        self.id, self.dir, self.url = "abc", "/runs/offline-run-abc/files", "https://wandb/run"
        self.fail, self.logged, self.defined, self.summary = fail, [], [], {}
        self.finished = 0

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined.append((name, options.get("step_metric")))

    def log(self, values: dict[str, Any]) -> None:
        if self.fail == "log":
            raise ConnectionResetError("Connection lost")
        self.logged.append(values)

    def finish(self) -> None:
        if self.fail == "finish":
            raise TimeoutError("not everything was uploaded")
        self.finished += 1


class FakeWandb(types.ModuleType):
    """What the tracker uses of wandb."""

    def __init__(self, run: FakeRun | None = None, key: str | None = None) -> None:
        super().__init__("wandb")
        self.run_, self.started, self.torn_down = run or FakeRun(), [], 0
        self.Settings = lambda **options: types.SimpleNamespace(**options)
        self.Image = lambda array, caption: ("image", array.shape)
        self.Histogram = lambda np_histogram: ("histogram", np_histogram)
        self.settings_ = types.SimpleNamespace(api_key=key, base_url="https://api.wandb.ai")

    def setup(self, settings: Any = None) -> Any:
        return types.SimpleNamespace(settings=self.settings_)

    def init(self, **options: Any) -> FakeRun:
        if self.run_.fail == "init":
            raise TimeoutError("Run initialization has timed out after 60.0 sec.\nmore")
        self.started.append(options)
        return self.run_

    def teardown(self, exit_code: int | None = None) -> None:
        self.torn_down += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeWandb]:
    """Puts a fake in the place of wandb."""

    def install(**options: Any) -> FakeWandb:
        wandb = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


@pytest.mark.parametrize("field", [{"project": ""}, {"media_every": 0}, {"timeout_s": 0.0}])
def test_a_config_that_cannot_work_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        TrackerConfig(**field)


def test_auto_without_a_key_is_offline_and_says_where(
    fake: Callable[..., FakeWandb], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, said = fake(), []
    tracker = start(TrackerConfig(tags=["a"]), tmp_path / "run", "demo", {"x": 1}, "old1", log=said.append)
    (options,) = wandb.started
    assert isinstance(tracker, Tracker) and tracker.run_id == "abc"
    assert options["mode"] == "offline" and options["resume"] == "allow" and options["id"] == "old1"
    assert options["dir"] == str(tmp_path / "run") and options["tags"] == ["a"]
    assert said == [
        "wandb: offline (no API key found); to upload the charts: wandb sync /runs/offline-run-abc"
    ]
    assert "WANDB_SILENT" not in os.environ and "WANDB_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("source", ["WANDB_API_KEY", "netrc", "settings"])
def test_auto_with_a_key_is_online(
    fake: Callable[..., FakeWandb], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    wandb, said = fake(key="secret" if source == "settings" else None), []
    if source == "WANDB_API_KEY":
        monkeypatch.setenv(source, "secret")
    if source == "netrc":
        Path(os.environ["NETRC"]).parent.mkdir()
        Path(os.environ["NETRC"]).write_text("machine api.wandb.ai login user password secret\n")
    start(TrackerConfig(), tmp_path, "demo", {}, log=said.append)
    assert wandb.started[0]["mode"] == "online"
    assert said[0].endswith("https://wandb/run") and source in said[0] and "secret" not in said[0]


@pytest.mark.parametrize(
    ("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", None)]
)
def test_wandb_mode_decides_where_the_config_does_not(
    fake: Callable[..., FakeWandb],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    mode: str | None,
) -> None:
    wandb, said = fake(key="k"), []
    monkeypatch.setenv("WANDB_MODE", value)
    tracker = start(TrackerConfig(), tmp_path, "demo", {}, log=said.append)
    assert [options["mode"] for options in wandb.started] == ([mode] if mode else [])
    assert isinstance(tracker, Tracker) == (mode is not None)
    assert "WANDB_MODE" in said[0]


@pytest.mark.parametrize(("mode", "reason"), [("online", "needs an API key"), ("upsidedown", "is none of")])
def test_a_mode_that_cannot_be_had_is_said(
    fake: Callable[..., FakeWandb],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    reason: str,
) -> None:
    wandb = fake()
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = start(TrackerConfig(), tmp_path, "demo", {}, "old1", log=pytest.fail)
    assert type(tracker) is NullTracker and tracker.run_id == "old1" and not wandb.started
    assert reason in caplog.text


def test_disabled_and_other_ranks_do_not_import_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    assert start(TrackerConfig(mode="disabled"), tmp_path, "x", {}, "id1").run_id == "id1"
    assert start(TrackerConfig(), tmp_path, "x", {}, "id1", rank=1).run_id == "id1"


def test_wandb_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    assert type(start(TrackerConfig(), tmp_path, "x", {}, "id1", log=said.append)) is NullTracker
    assert said == ['wandb: off (not installed; for charts: pip install "graft-moe[wandb]")']
    assert type(start(TrackerConfig(mode="offline"), tmp_path, "x", {})) is NullTracker
    assert "wandb failed and is off (ModuleNotFoundError" in caplog.text


def test_a_step_is_one_call_with_the_stage_before_every_name() -> None:
    run = FakeRun()
    tracker = Tracker(FakeWandb(run), run, media_every=2)
    tracker.log(_row(1), LOAD)
    tracker.log(_row(2), LOAD)
    tracker.log(_row(1, stage="cpt"))
    assert run.logged[0] == {"moe/step": 1, "moe/tokens": 10, "moe/loss": 2.0}
    assert set(run.logged[1]) - set(run.logged[0]) == {"moe/load", "moe/layer/01/load", "moe/layer/03/load"}
    kind, (values, edges) = run.logged[1]["moe/layer/03/load"]
    assert (
        kind == "histogram" and values.tolist() == [0.1, 0.2, 0.3, 0.4] and edges.tolist() == [0, 1, 2, 3, 4]
    )
    assert run.defined == [
        ("moe/step", None),
        ("moe/*", "moe/step"),
        ("cpt/step", None),
        ("cpt/*", "cpt/step"),
    ]
    tracker.finish({"val_loss": 1.0})
    assert run.summary == {"val_loss": 1.0} and run.finished == 1
    tracker.log(_row(3))  # after the end: nothing, and no error
    assert len(run.logged) == 3


def test_more_experts_than_wandb_has_bins_are_binned() -> None:
    run = FakeRun()
    tracker = Tracker(FakeWandb(run), run, media_every=1)
    tracker.log(_row(1), ExpertLoad([0], [[1 / 1024] * 1024]))
    _, (values, edges) = run.logged[0]["moe/layer/00/load"]
    assert len(values) == 512 and len(edges) == 513 and np.isclose(values.sum(), 1.0)


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_rows_are_kept(
    fake: Callable[..., FakeWandb], tmp_path: Path, caplog: pytest.LogCaptureFixture, fail: str
) -> None:
    wandb = fake(run=FakeRun(fail))
    with caplog.at_level(logging.WARNING):
        logger = RunLogger(tmp_path, start(TrackerConfig(), tmp_path, "demo", {}, "old1"))
        for step in range(4):
            logger.log(_row(step), LOAD)
        logger.finish({})
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [r["layers"] for r in read_rows(tmp_path / "load.jsonl")] == [[1, 3]] * 4
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Training goes on; metrics.jsonl has everything." in message and "\n" not in message
    assert wandb.torn_down == 1
    assert logger.tracker.run_id == ("old1" if fail == "init" else "abc")


def test_files_come_before_the_tracker(tmp_path: Path) -> None:
    seen = []

    class Watching(NullTracker):
        def log(self, row: Any, load: ExpertLoad | None = None) -> None:
            seen.append([r["step"] for r in read_rows(tmp_path / "metrics.jsonl")])

    logger = RunLogger(tmp_path, Watching())
    logger.log(_row(1))
    logger.log(_row(2))
    assert seen == [[1], [1, 2]]


def test_a_resumed_run_drops_rows_from_both_files(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, NullTracker())
    for step in range(4):
        logger.log(_row(step), LOAD)
    assert logger.truncate_after("moe", 1) == 2
    logger.sync()
    logger.finish()
    for name in ("metrics.jsonl", "load.jsonl"):
        assert [r["step"] for r in read_rows(tmp_path / name)] == [0, 1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run", NullTracker(), rank=1)
    logger.log(_row(1), LOAD)
    assert logger.truncate_after("moe", 0) == 0
    logger.sync()
    logger.finish()
    assert not (tmp_path / "run").exists()


def test_the_picture_is_pale_at_the_uniform_load() -> None:
    picture = load_image(np.array([[0.5, 0.5], [0.0, 1.0], [np.nan, np.nan]]), cell=3)
    assert picture.shape == (9, 6, 3) and picture.dtype == np.uint8

    def colour(text: str) -> list[int]:
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]

    assert picture[0, 0].tolist() == picture[2, 5].tolist() == colour(DIVERGING_STOPS[3])
    assert picture[3, 0].tolist() == colour(DIVERGING_STOPS[0])
    assert picture[3, 3].tolist() == colour(DIVERGING_STOPS[-1])
    assert picture[8, 0].tolist() == [128, 128, 128]


@pytest.fixture
def real_run(tmp_path: Path) -> Any:
    """A real offline run in a folder of its own, ended whatever the test does."""
    import wandb

    yield lambda log: start(
        TrackerConfig(mode="offline", media_every=2), tmp_path / "run", "demo", {"a": {"b": 1}}, log=log
    )
    wandb.teardown()


def _inspect(folder: Path) -> list[dict[str, Any]]:
    if Version(metadata.version("wandb")) < Version("0.31"):
        pytest.skip("wandb shows what its files hold since 0.31")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=patience(60)).stdout
    return [json.loads(line) for line in lines.splitlines()]


def test_an_offline_run_for_real(real_run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    tracker = real_run(said.append)
    logger = RunLogger(tmp_path / "run", tracker)
    for step in range(3):
        logger.log(_row(step, val_loss=float("nan")), LOAD)
    logger.finish({"moe_val_loss": 2.0})
    assert capfd.readouterr() == ("", "")  # our line went to `said`; wandb is silent
    folder = Path(said[0].split("wandb sync ")[1])
    assert folder.is_relative_to(tmp_path / "run" / "wandb") and tracker.run_id in folder.name
    records = _inspect(folder)
    steps = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [item["moe/loss"] for item in steps] == [3, 2, 1]
    assert steps[2]["moe/layer/03/load.values"] == [0.1, 0.2, 0.3, 0.4]
    assert "moe/load.path" not in steps[1] and (folder / "files" / steps[2]["moe/load.path"]).is_file()
    defined = [r["metric"] for r in records if r["type"] == "metric"]
    assert {"moe/*": "moe/step"}.items() <= {
        m.get("glob_name"): m.get("step_metric") for m in defined
    }.items()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # nothing in the home folder


def test_a_killed_wandb_process_does_not_stop_a_run(
    real_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    logger = RunLogger(tmp_path / "run", real_run(lambda line: None))
    logger.log(_row(0))
    services = [c for c in psutil.Process().children() if c.pid not in before and "wandb" in c.name()]
    assert services
    for service in services:
        service.kill()
    psutil.wait_procs(services, timeout=patience(10))
    for step in range(1, 2000):
        logger.log(_row(step))
    logger.finish({})
    assert len([r for r in caplog.records if "wandb failed and is off" in r.getMessage()]) == 1
    assert sum(1 for _ in read_rows(tmp_path / "run" / "metrics.jsonl")) == 2000


def test_importing_the_tracker_imports_neither_wandb_nor_matplotlib() -> None:
    code = f"import sys, {tracking.__name__}; print([m for m in ('wandb', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
