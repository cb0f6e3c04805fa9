"""Writes a prepared save on a thread of each rank, and publishes it when all parts are there.

The threads talk through the process group's store alone, by keys that nobody else uses: a collective of the
training group from a second thread would mix with those of training. Each rank leaves word of its part; the
first rank publishes, and leaves word of how it ended. Nobody else decides, so all ranks hear the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe.errors import GraftError
from recipes.checkpoint.host_copies import HostCopies
from recipes.checkpoint.writer import PreparedSave
from recipes.runtime.ranks import combined

_POLL_S = 0.02
# A part that is not there by then has been lost: no disk is that slow.
_WAIT_S = 3600.0
# A rank that has failed elsewhere waits so long for the others, of which some may be dead.
_HURRIED_S = 3.0


class BackgroundSave:
    """One save that is being written.

    Attributes:
        step: Optimizer steps done.
        seconds: From the beginning to the end; None until it has ended.
        noted: For the owner, who tells once how it ended.
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
            save: What all ranks have agreed on.
            copies: Holds the entries.
            entries: The copies that this rank writes, or why there are none.
            name: The same on all ranks, and of no other save.
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
        """Whether this rank knows how it has ended."""
        return not self._thread.is_alive()

    def wait(self) -> GraftError | None:
        """Until it has ended; returns why it failed, the same on all ranks, or None."""
        self._thread.join()
        return self.failure

    def abandon(self) -> None:
        """This rank has failed elsewhere, and others may be dead: waits for what can still be completed."""
        self._hurried.set()
        self._thread.join()

    def forget(self) -> None:
        """Clears what the ranks have left for each other, once all of them have read it."""
        ranks = self._save.ranks
        if ranks.is_rank0:
            for name in (*range(ranks.size), "outcome"):
                self._store.delete_key(f"{self._key}/{name}")

    @property
    def failure(self) -> GraftError | None:
        """Why it has failed, once it has ended."""
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
        except Exception as error:  # whatever it is, the others must hear of it
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
        """What a rank has left, waiting for it."""
        key, began = f"{self._key}/{name}", time.monotonic()
        hurried_at: float | None = None
        while not self._store.check([key]):
            now = time.monotonic()
            if self._hurried.is_set() and hurried_at is None:
                hurried_at = now
            if now - began > _WAIT_S or (hurried_at is not None and now - hurried_at > _HURRIED_S):
                whose = (
                    "rank 0 has not said how it ended" if name == "outcome" else f"rank {name} has not come"
                )
                return {"kind": "bug", "text": f"saving {self._save.final}: {whose}"}
            time.sleep(_POLL_S)
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found
