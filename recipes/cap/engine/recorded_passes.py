"""Reads the forward passes that a server's workers have recorded, by ``graft_vllm_experts``.

Letters: L MoE layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.accounting.attention_experts import moe_blocks
from moe.accounting.distinct import DistinctExperts
from moe.accounting.layers import ModelShape
from moe.accounting.passes import Batch
from moe.errors import ModelError
from recipes.cap.server import Server, ServerError, call

_FLAG = "--server-experts"
_BEGIN, _END = "graft_begin_record", "graft_end_record"


@dataclass(frozen=True)
class RecordedPass:
    """A forward pass of the engine.

    Attributes:
        start: Start in seconds, by the engine's clock.
        names: Names of the requests.
        batch: Their tokens.
        experts_L: Experts that each MoE layer used.
    """

    start: float
    names: tuple[str, ...]
    batch: Batch
    experts_L: tuple[frozenset[int], ...]

    @property
    def distinct(self) -> DistinctExperts:
        """Distinct experts of every layer."""
        return DistinctExperts(tuple(float(len(experts)) for experts in self.experts_L), "traced")

    @property
    def decodes(self) -> bool:
        """Whether it computes one token of every sequence, and none is the first."""
        return self.batch.new == (1,) * len(self.names) and min(self.batch.lengths) > 1


@dataclass(frozen=True)
class TimedPass:
    """A forward pass with the seconds to the start of the next one that goes on with one of its requests."""

    seconds: float
    recorded: RecordedPass


def begin_record(server: Server, shape: ModelShape | None) -> None:
    """Begins a record.

    Raises:
        ModelError: The server does not record, or its MoE layers are not those of the config.
    """
    experts = _call(server, _BEGIN, "experts")
    known = None if shape is None else [one.num_experts for one in moe_blocks(shape)]
    if known is not None and experts != known:
        rule = f"it has MoE layers of {experts} experts, the config describes {known}"
        raise ModelError.one(_FLAG, server.url, rule, "Name the folder that it serves.")


def end_record(server: Server) -> list[RecordedPass]:
    """Ends the record and returns its passes.

    Raises:
        ModelError: The server does not record, or computed a layer where it does not.
    """
    passes = _call(server, _END, "passes")
    if any(one["experts"] is None for one in passes):
        rule = "routers were called without the extension, in a compiled or replayed pass"
        raise ModelError.one(_FLAG, server.url, rule, "Start it with --enforce-eager.")
    return [_read(one) for one in passes]


def timed(passes: Sequence[RecordedPass]) -> list[TimedPass]:
    """Returns the passes with their seconds; those that no pass goes on from have none, and are left out."""
    return [
        TimedPass(later.start - one.start, one)
        for one, later in itertools.pairwise(passes)
        if set(one.names) & set(later.names)
    ]


def _call(server: Server, method: str, wanted: str) -> Any:
    """Calls a method of the extension, and returns what is wanted of its reply."""
    remedy = "Start it as docs/cap.md says, or leave the flag out: then the bound is given."
    try:
        # One result for each worker; of tensor parallelism they are alike.
        reply = call(server, "/collective_rpc", {"method": method})["results"][0]
        if "error" not in reply:
            return reply[wanted]
        rule, remedy = reply["error"], "Start the server as docs/cap.md says."
    except ServerError as error:
        rule = f"it does not record its passes: {error}"
    except (KeyError, IndexError, TypeError):
        rule = "it does not record its passes: it answers, and not as the extension does"
    raise ModelError.one(_FLAG, server.url, rule, remedy)


def _read(one: Mapping[str, Any]) -> RecordedPass:
    names, before, new = zip(*one["requests"], strict=True)
    lengths = tuple(b + n for b, n in zip(before, new, strict=True))
    experts = tuple(_bits(int(mask, 16)) for mask in one["experts"])
    return RecordedPass(one["start"], names, Batch(lengths, new), experts)


def _bits(mask: int) -> frozenset[int]:
    return frozenset(place for place in range(mask.bit_length()) if mask >> place & 1)
