"""All ranks succeed together or fail together: nobody waits for a rank that has given up.

Ranks talk in JSON, not in pickled objects.
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
    """The processes of a group, or this process alone when no process group is initialised.

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
        """True on the one rank that does what is done once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON-able), on every rank, by rank."""
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
        """Runs ``action`` on every rank and waits for all; when one fails, every rank raises.

        Args:
            what: What is being done, as in "writing /runs/a/step-00000010".
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
        except Exception as error:  # whatever it is, the others must hear of it
            mine, outcome = error, self.describe(what, error)
        outcomes = self.gather(outcome)
        failures = [outcome for outcome in outcomes if "kind" in outcome]
        if failures:
            raise combined(failures) from mine
        return [outcome["result"] for outcome in outcomes]

    def _device(self) -> torch.device:
        """Where the group's back end wants its tensors."""
        config = str(dist.get_backend_config(self._group))
        return torch.device("cpu" if "cpu:" in config else "cuda")

    def store(self) -> dist.Store:
        """Where ranks may leave word for each other without meeting, also from other threads."""
        if self.size == 1:
            return dist.HashStore()
        group = dist.group.WORLD if self._group is None else self._group
        return _get_process_group_store(group)

    def describe(self, what: str, error: Exception) -> dict[str, Any]:
        """An error as JSON, which `combined` makes an error of again."""
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
    """One error for what several ranks report; what they all say is said once."""
    bugs = [failure["text"] for failure in failures if failure["kind"] == "bug"]
    if bugs:
        return GraftError("\n".join(bugs[:_MISTAKES_SHOWN]))
    told = dict.fromkeys(tuple(mistake) for failure in failures for mistake in failure["mistakes"])
    mistakes = [Mistake(*mistake) for mistake in list(told)[:_MISTAKES_SHOWN]]
    disk = any(failure["kind"] == "disk" for failure in failures)
    return DiskError(mistakes) if disk else CheckpointError(mistakes)
