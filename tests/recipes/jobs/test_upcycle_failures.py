"""What goes wrong during a run: it ends with a sentence, an exit code, and its checkpoints whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe.upcycle.dense_shape import Matrix
from recipes.checkpoint import verify_checkpoint
from recipes.engines.micro_batch import MicroBatch
from recipes.engines.native.native_engine import NativeTrainModule
from recipes.models.export.mixtral import MixtralExporter
from recipes.models.export.spec import MoESpec
from recipes.tracking.metrics_log import read_rows
from recipes.training.training_loop import DivergedError
from tests.recipes.jobs.job_runs import Ended, job, rows, same_training, steps, summary


@pytest.fixture
def go(workplace: Path, text: str, first: Path) -> Callable[..., Ended]:
    """Runs under a name, from the default that the first run has cached."""

    def run(name: str, changes: Mapping[str, Any] | None = None) -> Ended:
        options = {"data.path": text, "run.name": name, "compare.cpt": False, "export.try_first": True}
        return job(workplace, options | dict(changes or {}))

    return run


def diverging(at_step: int) -> Any:
    """Makes the loss NaN in the step of this number, counted from 1 over all legs of the process."""
    original = NativeTrainModule._losses
    trained = [0]

    def losses(self: NativeTrainModule, batch: MicroBatch) -> Tensor:
        found = original(self, batch)
        trained[0] += torch.is_grad_enabled()
        return found * float("nan") if torch.is_grad_enabled() and trained[0] == at_step else found

    return patch.object(NativeTrainModule, "_losses", losses)


def test_a_loss_that_is_not_finite_ends_the_run(
    go: Callable[..., Ended], workplace: Path, text: str, first: Path
) -> None:
    assert DivergedError.exit_code == 1
    with diverging(5):
        ended = go("diverged", {"faults.max_nonfinite": 1})
    assert ended.code == 1
    run_dir = workplace / "outputs" / "diverged"
    assert ended.err.startswith("error: moe: at step 5 the loss is nan and the gradient norm nan")
    for part in (
        "weights were not updated",
        str(run_dir / "checkpoints"),
        "optim.lr (now 0.001)",
        "resume=auto",
    ):
        assert part in ended.err
    assert "Traceback" not in ended.err
    # What was saved is whole and finite, and no row of the step that failed is there.
    assert steps(run_dir / "checkpoints") == [2, 4]
    verify_checkpoint(run_dir / "checkpoints" / "step-00000004")
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    # Nothing of it is left in the weights: without the NaN the run goes on as one that never had it.
    resumed = job(workplace, {"data.path": text, "run.name": "diverged", "resume": "auto"})
    assert resumed.code == 0, resumed.err
    same_training(run_dir, first)


def disk_full_in(*writes: int) -> Any:
    """While open, the checkpoint files of these numbers, counted from 1, cannot be written."""
    written = [0]

    def write(*args: Any) -> Any:
        from recipes.runtime.safetensors_codec import write_tensors

        written[0] += 1
        if written[0] in writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(*args)

    return patch("recipes.checkpoint.writer.write_tensors", write)


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_over_a_full_disk(
    background: bool, go: Callable[..., Ended], workplace: Path, first: Path
) -> None:
    name = f"full-{background}"
    with disk_full_in(2):
        ended = go(name, {"train.async_save": background})
    assert ended.code == 0, ended.err
    run_dir = workplace / "outputs" / name
    assert "the checkpoint of step 4 was not saved" in ended.err and "No space left on device" in ended.err
    assert steps(run_dir / "checkpoints") == [2, 6]
    told = [row for row in read_rows(run_dir / "metrics.jsonl") if "failed_saves" in row]
    assert [row["failed_saves"] for row in told] == [1] and 5 <= told[0]["step"] <= 6
    found = [{k: v for k, v in row.items() if k != "failed_saves"} for row in rows(run_dir, "moe")]
    assert found == rows(first, "moe")


def test_the_best_checkpoint_is_kept(go: Callable[..., Ended], workplace: Path) -> None:
    # A learning rate at which the loss gets worse.
    changes = {"train.keep_best": True, "train.keep_last": 1, "train.eval_every": 2, "train.steps": 4}
    ended = go("best", changes | {"optim.lr": 0.3, "optim.schedule.kind": "constant"})
    assert ended.code == 0, ended.err
    run_dir = workplace / "outputs" / "best"
    losses = {row["step"]: row["val_loss"] for row in rows(run_dir, "moe")[2::2]}
    assert losses[2] < losses[4], losses
    assert steps(run_dir / "checkpoints") == [2, 4]


def test_a_full_disk_at_the_last_save_is_said_in_a_sentence(
    go: Callable[..., Ended], workplace: Path, text: str, first: Path
) -> None:
    with disk_full_in(3):
        ended = go("full")
    assert ended.code == 2
    run_dir = workplace / "outputs" / "full"
    assert "No space left on device" in ended.err and "Free some space" in ended.err
    assert str(run_dir / "checkpoints") in ended.err
    assert "Traceback" not in ended.err
    # The save that failed leaves nothing, those before it are whole.
    assert steps(run_dir / "checkpoints") == [2, 4]
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    verify_checkpoint(run_dir / "checkpoints" / "step-00000004")
    resumed = job(workplace, {"data.path": text, "run.name": "full", "resume": "auto"})
    assert resumed.code == 0, resumed.err
    same_training(run_dir, first)


def test_too_little_space_is_said_before_training(
    go: Callable[..., Ended], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    free = shutil.disk_usage(workplace)._replace(free=1000)
    monkeypatch.setattr("recipes.checkpoint.inventory.shutil.disk_usage", lambda path: free)
    ended = go("small")
    assert ended.code == 2
    assert "Traceback" not in ended.err and "checkpoints and the export" in ended.err
    assert not (workplace / "outputs" / "small").exists()


def test_a_full_disk_while_rows_are_written(go: Callable[..., Ended], workplace: Path) -> None:
    import os

    original = os.write

    def write(descriptor: int, data: bytes) -> int:
        if b'"step":3' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data)

    with patch("recipes.tracking.metrics_log.os.write", write):
        ended = go("full-rows")
    assert ended.code == 2
    assert "metrics.jsonl" in ended.err and "Traceback" not in ended.err
    lines = (workplace / "outputs" / "full-rows" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_a_surgery_that_is_not_exact_is_refused(go: Callable[..., Ended], workplace: Path) -> None:
    from moe.experts.experts import Experts

    original = Experts.forward
    with patch.object(Experts, "forward", lambda self, sent: 1.01 * original(self, sent)):
        ended = go("inexact")
    assert ended.code == 1
    assert "Traceback" not in ended.err and "layer" in ended.err
    assert rows(workplace / "outputs" / "inexact", "moe") == []


@pytest.fixture
def confused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that takes the first expert's gate for its up projection."""
    plain = MixtralExporter.expert_name

    def swapped(self: MixtralExporter, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        other: dict[Matrix, Matrix] = {"gate": "up", "up": "gate", "down": "down"}
        return plain(self, moe, expert, other[matrix] if expert == 0 else matrix, bias)

    monkeypatch.setattr(MixtralExporter, "expert_name", swapped)


@pytest.mark.usefixtures("confused")
def test_an_export_that_must_fail_ends_the_run_before_training(
    go: Callable[..., Ended], workplace: Path
) -> None:
    ended = go("bad-format")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "tried before training, the export fails" in ended.err
    assert "does not compute the model before training" in ended.err
    run_dir = workplace / "outputs" / "bad-format"
    assert rows(run_dir, "moe") == []
    assert not [path for path in run_dir.iterdir() if "export" in path.name or path.name == "hf"]


def test_the_trial_leaves_nothing_and_is_left_out_where_nothing_is_trained(
    first_run: Ended, first: Path, go: Callable[..., Ended]
) -> None:
    assert "export: tried before training as mixtral" in first_run.out
    assert not [path for path in first.iterdir() if "export" in path.name]
    ended = go("untrained", {"train.steps": 0})
    assert ended.code == 0, ended.err
    assert "tried before training" not in ended.out and "export: checked at the end alone" in ended.out


def test_the_trial_is_an_option_changes_nothing_and_is_made_once(
    first_run: Ended, first: Path, go: Callable[..., Ended], workplace: Path
) -> None:
    ended = go("untried", {"export.try_first": False, "compare.cpt": False})
    assert ended.code == 0 and "by export.try_first=false" in ended.out, ended.err
    same_training(workplace / "outputs" / "untried", first, ("moe",))
    longer = {"resume": "auto", "train.steps": 7, "compare.cpt": False}
    ended = go("untried", longer)
    assert ended.code == 0 and "tried before training as mixtral" in ended.out, ended.err
    ended = go("untried", longer | {"train.steps": 8})
    assert ended.code == 0 and "export: tried when the run began, not once more" in ended.out, ended.err
    ended = go("untried", longer | {"train.steps": 9, "export.dtype": "bf16"})
    assert ended.code == 0 and "tried before training as mixtral" in ended.out, ended.err


@pytest.mark.usefixtures("first", "confused")
def test_a_failed_export_ends_nothing_else(
    workplace: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if only the trained model's could not be written.
    monkeypatch.setattr("recipes.jobs.moe_stage.check_export_early", lambda *known: None)
    ended = job(workplace, {"data.path": text, "run.name": "bad-export"}, full=True)
    run_dir = workplace / "outputs" / "bad-export"
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "does not compute what was trained" in ended.err
    assert f"python -m tools.export {run_dir} --out DIR --dtype fp32" in ended.err
    found = summary(run_dir)
    assert [row["model"] for row in found["results"]] == ["dense", "cpt", "moe"]
    assert "does not compute" in found["export"]["failed"]
    assert "report: " in ended.out and "model:  " not in ended.out
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "The export failed: " in page and "from_pretrained" not in page
    # Once more: nothing is left to do, and the failure is still one.
    again = job(workplace, {"data.path": text, "run.name": "bad-export", "resume": "auto"})
    assert again.code == 1 and "--dtype fp32" in again.err


def test_engine_and_files_in_bf16_are_no_reason_to_fail(go: Callable[..., Ended], workplace: Path) -> None:
    # Large steps, so that the weights of bf16 are others.
    options = {"engine.precision": "bf16", "export.dtype": "bf16", "optim.lr": 0.05}
    ended = go("low", options)
    assert ended.code == 0, ended.err
    export = summary(workplace / "outputs" / "low")["export"]
    assert export["relative"] < 1e-4
    cost = export["rounding"]
    assert cost["dtype"] == "bfloat16" and 0 < cost["kl"] < 0.1 and 0 <= cost["choices_changed"] < 0.5
    assert cost["loss_rounded"] == pytest.approx(cost["loss_trained"], rel=0.05)
    assert cost["survival"]["changed"] > 0 and cost["survival"]["survived"] > 0.9
    assert "export.dtype=fp32 keeps what was trained" in ended.out


def test_a_method_that_is_not_exact_says_how_far_off_it_is(go: Callable[..., Ended]) -> None:
    ended = go("noisy", {"upcycle.noise_std": 0.5, "train.steps": 3, "train.save_every": 0})
    assert ended.code == 0, ended.err
    assert "this method is not exact under this router" in ended.out
    table = ended.out.partition("  layer  rel. error")[2].splitlines()
    assert [row.split()[0] for row in table[1:3]] == ["0", "1"], table[:3]


def test_a_second_ctrl_c_ends_it_at_once(
    go: Callable[..., Ended], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    def impatient(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("recipes.training.training_loop.lr_factor", impatient)
    ended = go("impatient")
    assert ended.code == 130
    # The handlers are put back: the next Ctrl-C is Python's own.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
