"""Writes a prepared save on a thread of each rank, and publishes it when all parts are there.

The threads communicate only through the process group's store, under keys that nobody else uses: a collective
of the training group from a second thread would mix with those of training. Each rank reports its part; rank
0 publishes and reports the outcome. Nobody else decides, so all ranks learn the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.errors import GraftError
from recipes.checkpoint.writer import PreparedSave
from recipes.runtime.ranks import combined

_POLL_S = 0.02
# A part that is not there by then has been lost: no disk is that slow.
_WAIT_S = 3600.0
# How long a rank that has failed elsewhere waits for the others, some of which may be dead.
_HURRIED_S = 3.0


class HostCopies:
    """Copies of a rank's tensors in host memory, which are written while training changes the tensors.

    Every save reuses the buffers. Those for tensors of a GPU are page-locked, so that it copies
    asynchronously.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def missing_bytes(self, entries: Sequence[tuple[str, Tensor]]) -> int:
        """Returns the bytes that `take` would have to allocate."""
        return sum(tensor.nbytes for key, tensor in entries if not self._fits(key, tensor))

    def take(self, entries: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copies the tensors as they are now. On a GPU the copy is only begun: call `wait` before reading it.

        Later work on the current stream comes after the copy, so the tensors may be changed at once.

        Raises:
            RuntimeError: There is not enough memory.
        """
        wanted = {key for key, _ in entries}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in wanted}
        copies, on_gpu = [], False
        for key, tensor in entries:
            if not self._fits(key, tensor):
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies.append((key, self._buffers[key].copy_(tensor.detach(), non_blocking=True)))
            on_gpu = on_gpu or tensor.is_cuda
        self._copied = None
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Waits until the copies are complete; may be called from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fits(self, key: str, tensor: Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)


class BackgroundSave:
    """A save that is being written in the background.

    Attributes:
        step: Optimizer steps done.
        seconds: Duration from beginning to end; None until it has ended.
        noted: Set by the owner once it has reported the outcome.
    """

    def __init__(
        self,
        save: PreparedSave,
        copies: HostCopies,
        entries: Sequence[tuple[str, Tensor]] | Exception,
        name: str,
        started: float,
    ) -> None:
        """Begins to write.

        Args:
            save: The save that all ranks have agreed on.
            copies: The owner of the entries' memory.
            entries: The copies that this rank writes, or the error that prevented them.
            name: Unique name of the save, the same on all ranks.
            started: When the save began, by ``time.perf_counter()``.
        """
        self.step = save.step
        self.noted = False
        self.seconds: float | None = None
        self._save = save
        self._copies = copies
        self._started = started
        self._outcome: dict[str, Any] = {}
        self._hurried = threading.Event()
        self._store = save.ranks.store()
        self._key = f"graft/save/{name}"
        self._thread = threading.Thread(target=self._work, args=(entries,), daemon=True, name="graft-save")
        self._thread.start()

    @property
    def ended(self) -> bool:
        """True once this rank knows the outcome."""
        return not self._thread.is_alive()

    def wait(self) -> GraftError | None:
        """Waits until it has ended; returns why it failed, the same on all ranks, or None."""
        self._thread.join()
        return self.failure

    def abandon(self) -> None:
        """Waits only briefly, since this rank has failed elsewhere and other ranks may be dead."""
        self._hurried.set()
        self._thread.join()

    def forget(self) -> None:
        """Deletes the messages of the ranks from the store, once all ranks have read them."""
        ranks = self._save.ranks
        if ranks.is_rank0:
            for name in (*range(ranks.size), "outcome"):
                self._store.delete_key(f"{self._key}/{name}")

    @property
    def failure(self) -> GraftError | None:
        """The error it failed with; None if it has not failed."""
        return combined([self._outcome]) if "kind" in self._outcome else None

    def _work(self, entries: Sequence[tuple[str, Tensor]] | Exception) -> None:
        try:
            self._outcome = self._part_and_outcome(entries)
        except Exception as error:  # the store is gone, and with it whoever held it
            self._outcome = self._save.ranks.describe(f"saving {self._save.final}", error)
        self.seconds = time.perf_counter() - self._started

    def _part_and_outcome(self, entries: Sequence[tuple[str, Tensor]] | Exception) -> dict[str, Any]:
        ranks = self._save.ranks
        self._store.set(f"{self._key}/{ranks.rank}", json.dumps(self._write(entries)))
        if not ranks.is_rank0:
            return self._read("outcome")
        outcome = self._publish([self._read(str(rank)) for rank in range(ranks.size)])
        self._store.set(f"{self._key}/outcome", json.dumps(outcome))
        return outcome

    def _write(self, entries: Sequence[tuple[str, Tensor]] | Exception) -> dict[str, Any]:
        try:
            if isinstance(entries, Exception):
                raise entries
            self._copies.wait()
            return {"result": self._save.write(entries).model_dump()}
        except Exception as error:  # whatever it is, the others must learn of it
            return self._save.ranks.describe(f"writing {self._save.temporary}", error)

    def _publish(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        failures = [part for part in parts if "kind" in part]
        try:
            if failures:
                raise combined(failures)
            self._save.publish([part["result"] for part in parts])
        except Exception as error:
            self._save.discard()
            return self._save.ranks.describe(f"publishing {self._save.final}", error)
        return {"result": None}

    def _read(self, name: str) -> dict[str, Any]:
        """Waits for the message of a rank and returns it."""
        key, began = f"{self._key}/{name}", time.monotonic()
        hurried_at: float | None = None
        while not self._store.check([key]):
            now = time.monotonic()
            if self._hurried.is_set() and hurried_at is None:
                hurried_at = now
            if now - began > _WAIT_S or (hurried_at is not None and now - hurried_at > _HURRIED_S):
                whose = (
                    "rank 0 has not reported the outcome"
                    if name == "outcome"
                    else f"rank {name} has not come"
                )
                return {"kind": "bug", "text": f"saving {self._save.final}: {whose}"}
            time.sleep(_POLL_S)
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found
