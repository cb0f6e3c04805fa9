"""Saves the checkpoints of a stage one after the other, in the background if asked for.

A save that fails because of the disk does not end training: it is reported, and the next save tries again.
The last save of a stage must succeed, and all ranks wait for it.
"""

from __future__ import annotations

import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe.errors import DiskError, GraftError
from recipes.checkpoint.background import BackgroundSave, HostCopies
from recipes.checkpoint.inventory import Retention, readable
from recipes.checkpoint.manifest import Origin
from recipes.checkpoint.shard_layout import GlobalTensor
from recipes.checkpoint.writer import PreparedSave, prepare_save, write_and_publish
from recipes.runtime.machine_memory import spare_bytes
from recipes.runtime.ranks import Ranks


class Saver:
    """Saver of one stage. Its methods are collective, except for `figures` and `abandon`."""

    def __init__(
        self,
        root: Path,
        keep: Retention,
        *,
        background: bool,
        origin: Origin | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Prepares to save; touches nothing yet.

        Args:
            root: The folder of the checkpoints, on a file system that all ranks see.
            keep: Rule by which older checkpoints are kept.
            background: Whether training goes on while a checkpoint is written.
            origin: The run, and what it went on from; None for none.
            group: The ranks that take part; None is all of them, or this process alone.
        """
        self._root = root
        self._keep = keep
        self._background = background
        self._origin = origin or Origin()
        self._ranks = Ranks(group)
        self._copies = HostCopies()
        self._pending: BackgroundSave | None = None
        self._before: BackgroundSave | None = None
        self._figures: dict[str, float] = {}
        self._failed = 0
        self._warned_of_memory = False

    def save(
        self,
        step: int,
        tensors: Mapping[str, GlobalTensor],
        state: Mapping[str, Any],
        rank_tensors: Mapping[str, Tensor],
        *,
        final: bool = False,
    ) -> None:
        """Saves as `save_checkpoint` does, once the previous save has ended.

        Args:
            step: Optimizer steps done.
            tensors: Global name -> tensor.
            state: JSON-able, the same on all ranks.
            rank_tensors: Tensors that belong to this rank only.
            final: Whether it is the last save of the stage, which is complete on return.

        Raises:
            DiskError: The disk refused a save that is `final`.
            CheckpointError: The ranks disagree, or pieces of a tensor are missing.
            GraftError: A rank failed in another way.
        """
        started = time.perf_counter()
        self.settle()
        try:
            prepared = prepare_save(
                self._root, step, tensors, state, rank_tensors, self._keep, self._origin, self._ranks
            )
            if self._background and not final:
                self._begin(prepared, started)
            else:
                write_and_publish(prepared)
        except DiskError as error:
            if final:
                raise
            self._report(step, error)
        stall = time.perf_counter() - started
        self._figures["save_stall_s"] = stall
        if self._pending is None:
            self._figures |= {"save_s": stall, "save_step": step}

    def settle(self) -> None:
        """Waits until the save in flight, if any, has ended.

        Raises:
            GraftError: It has failed for another reason than the disk.
        """
        if self._pending is None:
            return
        failure = self._pending.wait()
        self._note(self._pending)
        self._before, self._pending = self._pending, None
        if failure is not None and not isinstance(failure, DiskError):
            raise failure

    def figures(self) -> dict[str, float]:
        """Returns metrics that are new since the last call, for the row of a step.

        Returns:
            ``save_stall_s``: seconds that training waited for a save; ``save_s`` and ``save_step`` of a save
            that has ended; ``failed_saves`` so far, once there is one.
        """
        if self._pending is not None and self._pending.ended:
            self._note(self._pending)
        new, self._figures = self._figures, {}
        return new

    def abandon(self) -> None:
        """Completes the save in flight if the other ranks still can; for a rank that ends by an error."""
        if self._pending is not None:
            self._pending.abandon()
            self._note(self._pending)
            self._pending = None

    def _begin(self, prepared: PreparedSave, started: float) -> None:
        """Copies the tensors to be written and leaves the writing to a thread."""
        needed = self._copies.missing_bytes(prepared.entries)
        found = self._ranks.gather([uuid.uuid4().hex, needed, socket.gethostname(), spare_bytes()])
        if self._before is not None:
            self._before.forget()
            self._before = None
        short = _short_of_memory(found)
        if short is not None:
            if self._ranks.is_rank0 and not self._warned_of_memory:
                self._warned_of_memory = True
                print(f"checkpoints are written while training waits: {short}", file=sys.stderr, flush=True)
            write_and_publish(prepared)
            return
        try:
            entries: list[tuple[str, Tensor]] | Exception = self._copies.take(prepared.entries)
        except Exception as error:  # the other ranks must learn of it
            entries = error
        self._pending = BackgroundSave(prepared, self._copies, entries, found[0][0], started)

    def _note(self, ended: BackgroundSave) -> None:
        """Records the outcome of a background save, once."""
        if ended.noted:
            return
        ended.noted = True
        if ended.failure is not None:
            self._report(ended.step, ended.failure)
        elif ended.seconds is not None:
            self._figures |= {"save_s": ended.seconds, "save_step": ended.step}

    def _report(self, step: int, error: GraftError) -> None:
        self._failed += 1
        self._figures["failed_saves"] = self._failed
        if self._ranks.is_rank0:
            print(
                f"the checkpoint of step {step} was not saved; older ones are whole, training goes on, and "
                f"the next save tries again: {error}",
                file=sys.stderr,
                flush=True,
            )


def _short_of_memory(ranks: list[list[Any]]) -> str | None:
    """Explains why the copies of all ranks do not fit into the memory of their machines; None if they do.

    Args:
        ranks: For each rank [name, bytes that it needs, its machine, bytes that it found spare there].
    """
    for machine in dict.fromkeys(rank[2] for rank in ranks):
        needed = sum(rank[1] for rank in ranks if rank[2] == machine)
        spare = min(rank[3] for rank in ranks if rank[2] == machine)
        if needed > spare:
            return (
                f"a copy of what the ranks of {machine} hold takes {readable(needed)} of memory, and "
                f"{readable(spare)} are left there. Set train.async_save=false, or use more machines."
            )
    return None
