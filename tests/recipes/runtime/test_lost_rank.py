"""What a rank says when another has gone, or when memory is short."""

from __future__ import annotations

import errno
import os

import psutil
import pytest
import torch

from recipes import launch
from recipes.runtime import lost_rank as module
from recipes.runtime import machine_memory
from recipes.runtime.lost_rank import lost_rank, missing_ranks
from recipes.runtime.machine_memory import is_out_of_memory
from recipes.tracking.ceilings import Ceiling, unless_short_of_memory

_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (_GLOO, True),
        ("[..gloo/transport/tcp/pair.cc:521] Read error [10.0.0.2]:8: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error", True),
        (
            "TCPStore recvValue failed on SocketImpl: Connection was likely closed. Did it crash?",
            True,
        ),
        ("rank 0 failed while publishing x: RuntimeError: " + _GLOO, True),
        ("shape mismatch", False),
        ("Connection reset by peer", False),
    ],
)
def test_which_errors_are_due_to_a_rank_that_is_gone(
    text: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "live_local_ranks", lambda: None)
    assert (lost_rank(RuntimeError(text)) is not None) is lost


def test_the_rank_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_kills", lambda: 2)
    # The second of two machines with four ranks each; its third rank is gone.
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "live_local_ranks", lambda: {0, 1, 3})
    words = lost_rank(RuntimeError(_GLOO))
    assert words is not None and words.startswith("rank 6 has ended without a word")
    assert "killed 2 processes here that took too much memory" in words and "resume=auto" in words
    assert not module.speaks_for_the_rest()
    monkeypatch.setattr(module, "live_local_ranks", lambda: {1, 3})
    assert missing_ranks() == [4, 6] and module.speaks_for_the_rest()


def test_ranks_are_found_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, rank: int = 0, status: str = psutil.STATUS_RUNNING) -> None:
            self._rank, self._status = rank, status

        def parent(self) -> Process:
            return self

        def children(self) -> list[Process]:
            ending = Process(3)
            ending.environ = dict  # type: ignore[method-assign,assignment]
            return [Process(0), Process(1, psutil.STATUS_ZOMBIE), Process(2), ending]

        def status(self) -> str:
            return self._status

        def environ(self) -> dict[str, str]:
            return {"LOCAL_RANK": str(self._rank)}

    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert module.live_local_ranks() == {0, 2}
    monkeypatch.setenv("LOCAL_RANK", "4")  # not told by these environments, which are others' then
    assert module.live_local_ranks() is None


_NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("can not allocate 74973184 bytes"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.mark.parametrize("error", _NO_MEMORY)
def test_errors_of_memory_are_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def fails() -> int:
        raise error

    assert is_out_of_memory(error)
    assert launch._guarded(fails) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not enough memory, in ") and "train.micro_batch_size" in line


def test_other_errors_keep_their_traces() -> None:
    def fails() -> int:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        launch._guarded(fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        unless_short_of_memory(fails)


def test_a_figure_that_there_is_no_memory_for_is_left_out() -> None:
    def fails() -> Ceiling:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    assert unless_short_of_memory(fails) == Ceiling(None, None, "there is not enough memory to measure it")
    assert unless_short_of_memory(lambda: 5) == 5


@pytest.mark.parametrize(("left", "short"), [(2**20, True), (None, False)])
def test_a_thread_that_is_not_started_is_short_of_memory_under_a_limit_alone(
    left: int | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_memory, "address_space_left", lambda: left)
    assert is_out_of_memory(RuntimeError("Resource temporarily unavailable")) is short
