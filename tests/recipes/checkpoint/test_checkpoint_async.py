"""Saves in the background: complete or invisible, one at a time, and no disk ends training."""

from __future__ import annotations

import contextlib
import errno
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe.errors import DiskError, GraftError
from recipes.checkpoint import Retention, Saver, find_checkpoint, load_checkpoint, verify_checkpoint
from recipes.checkpoint.background import BackgroundSave, HostCopies
from recipes.runtime.safetensors_codec import write_tensors
from tests.distributed_helper import run_ranks

WRITER = "recipes.checkpoint.writer.write_tensors"
FULL = OSError(errno.ENOSPC, "No space left on device")


def saver(root: Path, last: int | None = None, *, background: bool = True) -> Saver:
    return Saver(root, Retention(last), background=background)


@contextlib.contextmanager
def writing(action: Callable[[], None]) -> Iterator[None]:
    """While open, every file of tensors is written after `action`, which may raise."""

    def write(path: Path, entries: Sequence[tuple[str, Tensor]]) -> tuple[int, int]:
        action()
        return write_tensors(path, entries)

    with patch(WRITER, write):
        yield


@contextlib.contextmanager
def entered(name: str) -> Iterator[threading.Event]:
    """While open, the event is set whenever somebody calls the method of the save in flight."""
    event, method = threading.Event(), getattr(BackgroundSave, name)

    def note(save: BackgroundSave) -> Any:
        event.set()
        return method(save)

    with patch.object(BackgroundSave, name, note):
        yield event


def hold(event: threading.Event) -> None:
    """Writes only once the event is set."""
    event.wait()


def fail() -> None:
    raise FULL


def visible(root: Path) -> list[str]:
    return (
        sorted(path.name for path in root.iterdir() if path.name.startswith("step-")) if root.is_dir() else []
    )


def loaded(path: Path | None, like: Tensor) -> Tensor:
    assert path is not None
    value = torch.zeros_like(like)
    load_checkpoint(path, {"a": value})
    return value


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    gate, saves, value = threading.Event(), saver(tmp_path), torch.arange(10.0)
    with writing(lambda: hold(gate)):
        saves.save(1, {"a": value}, {"n": 1}, {"rng": torch.ones(2)})
        value.zero_()  # training goes on
        assert visible(tmp_path) == [] and find_checkpoint(tmp_path).path is None
        assert set(saves.figures()) == {"save_stall_s"} and saves.figures() == {}
        gate.set()
        saves.settle()
    assert visible(tmp_path) == ["step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(loaded(tmp_path / "step-00000001", value), torch.arange(10.0))
    done = saves.figures()
    assert set(done) == {"save_step", "save_s"} and done["save_step"] == 1
    assert saves.figures() == {}


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    saves, began = saver(tmp_path, last=1), []

    def slow() -> None:
        began.append(visible(tmp_path))
        if threading.current_thread() is not threading.main_thread():
            hold(waits)  # until the next save has come
            waits.clear()

    with entered("wait") as waits, writing(slow):
        for step in (1, 2, 3):
            saves.save(step, {"a": torch.full((4,), float(step))}, {}, {}, final=step == 3)
    # When a save begins to write, the one before it is complete, and kept until this one is.
    assert began == [[], ["step-00000001"], ["step-00000002"]]
    assert visible(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_the_next_save_tries_again(
    tmp_path: Path, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = saver(tmp_path, background=background)
    saves.save(1, {"a": torch.ones(2)}, {}, {})
    saves.settle()
    saves.figures()
    with writing(fail):
        saves.save(2, {"a": torch.zeros(2)}, {}, {})
        saves.settle()
    assert saves.figures()["failed_saves"] == 1
    err = capsys.readouterr().err
    assert "the checkpoint of step 2 was not saved" in err and "No space left on device" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(loaded(find_checkpoint(tmp_path).path, torch.ones(2)), torch.ones(2))
    saves.save(3, {"a": torch.zeros(2)}, {}, {})
    saves.settle()
    assert visible(tmp_path) == ["step-00000001", "step-00000003"]
    # The last save of a leg must succeed.
    with writing(fail), pytest.raises(DiskError, match="No space left on device"):
        saves.save(4, {"a": torch.zeros(2)}, {}, {}, final=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_folder_that_vanishes(tmp_path: Path, background: bool, capsys: pytest.CaptureFixture[str]) -> None:
    root, saves = tmp_path / "checkpoints", saver(tmp_path / "checkpoints", background=background)

    def vanish() -> None:
        (root / ".tmp-step-00000001").rename(tmp_path / "elsewhere")

    with writing(vanish):
        saves.save(1, {"a": torch.ones(2)}, {}, {})
        saves.settle()
    assert "the checkpoint of step 1 was not saved" in capsys.readouterr().err
    (root).rename(tmp_path / "gone as well")
    root.write_text("in the way")
    saves.save(2, {"a": torch.ones(2)}, {}, {})
    saves.settle()
    assert "the checkpoint of step 2 was not saved" in capsys.readouterr().err
    root.unlink()
    saves.save(3, {"a": torch.ones(2)}, {}, {}, final=True)
    assert visible(root) == ["step-00000003"]


def test_an_error_in_training_does_not_lose_the_save_in_flight(tmp_path: Path) -> None:
    saves = saver(tmp_path)
    with entered("abandon") as abandoned, writing(lambda: hold(abandoned)):
        saves.save(1, {"a": torch.ones(2)}, {}, {})
        assert visible(tmp_path) == []
        saves.abandon()
    assert visible(tmp_path) == ["step-00000001"]
    saves.abandon()  # there is nothing in flight any more
    assert saves.figures()["save_step"] == 1


def test_a_mistake_in_the_background_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def break_down() -> None:
        raise RuntimeError("a tensor went away")

    saves = saver(tmp_path)
    with writing(break_down):
        saves.save(1, {"a": torch.ones(2)}, {}, {})
        with pytest.raises(
            GraftError, match="rank 0 failed while writing .*: RuntimeError: a tensor went away"
        ):
            saves.settle()
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_said_once_and_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipes.checkpoint.saver.spare_bytes", lambda: 2**20)
    saves = saver(tmp_path)
    for step in (1, 2):
        saves.save(step, {"a": torch.ones(2**18 + 1)}, {}, {})
        assert visible(tmp_path)[-1] == f"step-{step:08d}"  # on return
        assert saves.figures()["save_step"] == step
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "written while training waits" in err and "takes 1.0 MiB of memory, and 1.0 MiB are left" in err
    saves.save(3, {"a": torch.ones(2**18)}, {}, {})
    assert "save_step" not in saves.figures() or visible(tmp_path)[-1] == "step-00000003"
    saves.settle()


def test_buffers_are_used_again() -> None:
    copies = HostCopies()
    entries = [("a", torch.ones(3)), ("b", torch.ones(2, 2).t()), ("c", torch.tensor(4))]
    assert copies.missing_bytes(entries) == 12 + 16 + 8
    first = copies.take(entries)
    assert copies.missing_bytes(entries) == 0
    assert [tensor.tolist() for _, tensor in first] == [tensor.tolist() for _, tensor in entries]
    again = copies.take([("a", torch.zeros(3)), ("c", torch.tensor(5.0))])
    assert again[0][1].data_ptr() == first[0][1].data_ptr() and not again[0][1].any()
    assert again[1][1].dtype == torch.float32
    assert copies.missing_bytes(entries) == 16 + 8  # b is gone, and c has another type


def test_the_best_is_kept(tmp_path: Path) -> None:
    saves = Saver(tmp_path, Retention(2, "val_loss"), background=True)
    for step, loss in ((1, 5.0), (2, 3.0), (3, 3.0), (4, 4.0), (5, None), (6, 3.5)):
        saves.save(step, {"a": torch.ones(1)}, {"val_loss": loss}, {}, final=step == 6)
    # The lowest, of two alike the first, and the last two.
    assert visible(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    saves.save(7, {"a": torch.ones(1)}, {"val_loss": 2.0}, {}, final=True)
    assert visible(tmp_path) == ["step-00000006", "step-00000007"]
    saves.save(8, {"a": torch.ones(1)}, {"val_loss": float("nan")}, {}, final=True)
    saves.save(9, {"a": torch.ones(1)}, {"val_loss": 4.0}, {}, final=True)
    assert visible(tmp_path) == ["step-00000007", "step-00000008", "step-00000009"]


def _two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Everything that takes two ranks, one after the other; returns what each rank saw."""
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = {"a": distribute_tensor(torch.arange(7.0), mesh, [Shard(0)]), "b": torch.ones(3)}
    seen: dict[str, Any] = {}
    seen["overlap"] = _overlap(Path(folder) / "overlap", tensors, rank)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        seen["one full"] = _one_full(Path(folder) / "full", tensors, rank)
    seen["told"] = err.getvalue()
    dist.barrier()
    seen["left alone"] = _left_alone(Path(folder) / "alone", tensors, rank)
    return seen


def _overlap(root: Path, tensors: dict[str, Tensor], rank: int) -> tuple[list[float], list[float]]:
    """Training's own collectives go on while rank 1 has not written; then what was saved is loaded."""
    saves, sums, trained = saver(root), [], threading.Event()
    with writing(lambda: hold(trained) if rank else None):
        saves.save(1, tensors, {}, {"rng": torch.tensor([rank])})
        for step in range(50):
            local = tensors["a"]
            assert isinstance(local, DTensor)
            local.to_local().add_(1.0)
            total = torch.tensor([float(step)])
            dist.all_reduce(total)
            sums.append(total.item())
        assert visible(root) == []
        trained.set()
        saves.settle()
    back = {"a": torch.zeros(7), "b": torch.zeros(3)}
    load_checkpoint(root / "step-00000001", back)
    return sums, back["a"].tolist()


def _one_full(root: Path, tensors: dict[str, Tensor], rank: int) -> tuple[list[str], list[str], int]:
    """The disk of rank 1 alone is full, once."""
    saves = saver(root)
    saves.save(1, tensors, {}, {})
    saves.settle()
    with writing(fail if rank else lambda: None):
        saves.save(2, tensors, {}, {})
        saves.settle()
    after = sorted(path.name for path in root.iterdir())
    failed = int(saves.figures()["failed_saves"])
    saves.save(3, tensors, {}, {}, final=True)
    return after, visible(root), failed


def _left_alone(root: Path, tensors: dict[str, Tensor], rank: int) -> list[str]:
    """Rank 1 stops writing for good, as a killed one does, and rank 0 does not wait for it for ever."""
    gate, saves = threading.Event(), saver(root)
    with (
        patch("recipes.checkpoint.background._HURRIED_S", 0.05),
        writing(lambda: hold(gate) if rank else None),
    ):
        saves.save(1, tensors, {}, {})
        if rank == 0:
            saves.abandon()
        dist.barrier()
        found = visible(root)
        gate.set()
        if rank == 1:
            saves.abandon()
    return found


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(_two_ranks, 2, str(tmp_path))
    sums, back = first["overlap"]
    assert first["overlap"] == second["overlap"]
    assert sums == [2.0 * step for step in range(50)]
    assert back == [float(i) for i in range(7)]
    assert first["one full"] == second["one full"]
    after, end, failed = first["one full"]
    assert after == ["step-00000001"] and end == ["step-00000001", "step-00000003"] and failed == 1
    assert "rank 1 failed while writing" in first["told"] and second["told"] == ""
    assert first["left alone"] == second["left alone"] == []
