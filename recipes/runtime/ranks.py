"""Collective actions that succeed or fail on all ranks, so that no rank waits for one that has failed.

Ranks exchange JSON, never pickled objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from moe.errors import CheckpointError, DiskError, GraftError, Mistake, UserError
from recipes.runtime.atomic import disk_mistake

_MISTAKES_SHOWN = 8


class Ranks:
    """Processes of a group, or this process alone if no process group is initialised.

    Attributes:
        rank: This process's rank in the group.
        size: Number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        assert self.rank >= 0, "a rank outside the process group took part in a checkpoint"

    @property
    def is_rank0(self) -> bool:
        """True on the rank that does everything that is done once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's ``value`` (JSON-able), on every rank, by rank."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        device = self._device()
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group=self._group)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        padded[: len(mine)] = mine
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(text[:size].cpu().numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    def together(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Runs ``action`` on every rank and waits for all; if one fails, every rank raises.

        Args:
            what: Description of the action, as in "writing /runs/a/step-00000010".
            action: Local work without communication; returns something JSON-able.

        Returns:
            Every rank's result, by rank.

        Raises:
            DiskError: The operating system refused something on at least one rank.
            UserError: A rank raised one; of that class if all agree, else CheckpointError.
            GraftError: A rank failed in another way.
        """
        mine: Exception | None = None
        try:
            outcome = {"result": action()}
        except Exception as error:  # whatever it is, the others must learn of it
            mine, outcome = error, self.describe(what, error)
        outcomes = self.gather(outcome)
        failures = [outcome for outcome in outcomes if "kind" in outcome]
        if failures:
            raise combined(failures) from mine
        return [outcome["result"] for outcome in outcomes]

    def _device(self) -> torch.device:
        """Returns the device of tensors for the group's back end."""
        config = str(dist.get_backend_config(self._group))
        return torch.device("cpu" if "cpu:" in config else "cuda")

    def store(self) -> dist.Store:
        """Returns a store for messages between ranks outside of collectives, also from other threads."""
        if self.size == 1:
            return dist.HashStore()
        group = dist.group.WORLD if self._group is None else self._group
        return _get_process_group_store(group)

    def describe(self, what: str, error: Exception) -> dict[str, Any]:
        """Encodes an error as JSON, which `combined` decodes."""
        if isinstance(error, UserError):
            mistakes = [(m.path, str(m.value), m.rule, m.remedy) for m in error.mistakes]
            return {"kind": "disk" if isinstance(error, DiskError) else "user", "mistakes": mistakes}
        if isinstance(error, OSError):
            cause = disk_mistake(error.filename or "disk", error)
            rule = f"rank {self.rank} failed while {what}"
            return {"kind": "disk", "mistakes": [(cause.path, str(cause.value), rule, cause.remedy)]}
        return {
            "kind": "bug",
            "text": f"rank {self.rank} failed while {what}: {type(error).__name__}: {error}",
        }


def combined(failures: Sequence[dict[str, Any]]) -> GraftError:
    """Combines the failures of several ranks into one error, without repetitions."""
    bugs = [failure["text"] for failure in failures if failure["kind"] == "bug"]
    if bugs:
        return GraftError("\n".join(bugs[:_MISTAKES_SHOWN]))
    distinct = dict.fromkeys(tuple(mistake) for failure in failures for mistake in failure["mistakes"])
    mistakes = [Mistake(*mistake) for mistake in list(distinct)[:_MISTAKES_SHOWN]]
    disk = any(failure["kind"] == "disk" for failure in failures)
    return DiskError(mistakes) if disk else CheckpointError(mistakes)
