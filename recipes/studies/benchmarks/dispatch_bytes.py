"""Weak scaling of the exchange of rows between ranks: bytes sent, against the least possible.

Every rank has equally many tokens and its slice of the experts, which leave rows as they are: what is timed
is dispatch and combine alone, and their backward; then the same with a shared expert, which runs once the
rows have arrived, or while they travel. Bytes are counted at the inputs of the collectives, without the part
that a rank sends to itself.

Letters: T tokens of a rank, D model width, E experts, K experts per token, P ranks; N rows.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.bench.timing import Timing, summarise
from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.experts.shared import SharedExpert
from moe.experts.weights import FFNWeights
from moe.types import Routing

_TIMEOUT = timedelta(minutes=10)
_WARMUP = 2
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DispatchShape:
    """Tokens and experts of the exchange.

    Attributes:
        tokens: T.
        width: D.
        experts: E, of all ranks together.
        top_k: K.
        dtype: Dtype of rows: ``fp32`` or ``bf16``.
        skewed: Low experts are chosen more often than high ones.
        shared_width: Width of the shared expert.
    """

    tokens: int
    width: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    skewed: bool = False
    shared_width: int = 1024

    def ids(self, rank: int) -> Tensor:
        """Draws ``[T, K]`` distinct experts of each token, which depend on the rank alone."""
        generator = torch.Generator().manual_seed(rank + 1)
        noise_TE = torch.rand(self.tokens, self.experts, generator=generator).clamp_min(1e-9)
        share_E = torch.ones(self.experts)
        if self.skewed:
            share_E = 1 / torch.arange(1, self.experts + 1)
        # the largest of u^(1/p) are drawn without replacement by shares p
        return (noise_TE.log() / share_E).topk(self.top_k, dim=-1).indices

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return self.width * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Needed:
    """Rows that a rank's tokens make necessary in one direction, from the routing alone.

    Attributes:
        least: One for each token and other rank that holds one of its experts.
        slots: One for each token and expert on another rank, as without duplicates merged.
        gathered: Every token to every other rank, as an all-gather sends them.
    """

    least: int
    slots: int
    gathered: int


def needed_rows(ids_TK: Tensor, experts: int, ranks: int, rank: int) -> Needed:
    """Counts the rows that a rank's tokens make necessary.

    Args:
        ids_TK: ``[T, K]`` experts of the rank's tokens.
        experts: E.
        ranks: P.
        rank: The rank that has the tokens.
    """
    rank_TK = ids_TK // (experts // ranks)
    wanted_TP = torch.zeros(len(ids_TK), ranks, dtype=torch.bool).scatter_(1, rank_TK, True)
    wanted_TP[:, rank] = False
    slots = int((rank_TK != rank).sum())
    return Needed(int(wanted_TP.sum()), slots, len(ids_TK) * (ranks - 1))


class WireCounter(TorchDispatchMode):
    """Counts what this rank hands to all-to-all for others, while it is entered.

    Attributes:
        rows: Bytes of tensors whose last axis is the model width.
        metadata: Bytes of all others: counts, expert ids, combine weights, and the gradients of those.
        calls: Collectives.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.rows = self.metadata = self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            sent, splits = args[1], args[4]
            lines = len(sent)
            home = splits[self.rank] if splits else lines // dist.get_world_size()
            away = sent[0].nbytes * (lines - home) if lines else 0
            self.calls += 1
            if sent.ndim == 2 and sent.shape[1] == self.width:
                self.rows += away
            else:
                self.metadata += away
        elif func.namespace == "c10d" and "barrier" not in func.name():
            raise AssertionError(f"{func.name()} is not counted")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class RankFigures:
    """Measurements of one rank.

    Attributes:
        rows: Bytes of rows it sent in forward.
        metadata: Bytes of the rest in forward.
        rows_training: Bytes of rows it sent in forward and backward.
        metadata_training: Bytes of the rest.
        calls: Collectives in forward.
        needed: Rows in one direction.
        forward: Seconds of every round.
        training: Seconds of every round, backward included.
        shared_after: The same, with a shared expert that waits for the rows to arrive.
        shared_beside: The same, with one that runs while they travel.
    """

    rows: int
    metadata: int
    rows_training: int
    metadata_training: int
    calls: int
    needed: Needed
    forward: list[float]
    training: list[float]
    shared_after: list[float]
    shared_beside: list[float]


@dataclass(frozen=True)
class Scaling:
    """All ranks of one size.

    Attributes:
        ranks: P.
        figures: Figures of every rank.
        least: Bytes of rows that must be sent there and back in forward, of all ranks.
        slots: The same without duplicates merged.
        gathered: The same of an all-gather and a reduce-scatter.
        rows: Bytes of rows sent in forward, of all ranks.
        metadata: Bytes of the rest.
        forward: Seconds, round by round of the slowest rank.
        training: The same with backward.
        shared_after: The same with a shared expert as well, that waits for the rows to arrive.
        shared_beside: The same, with one that runs while they travel.
    """

    ranks: int
    figures: tuple[RankFigures, ...]
    least: int
    slots: int
    gathered: int
    rows: int
    metadata: int
    forward: Timing
    training: Timing
    shared_after: Timing
    shared_beside: Timing


def exchange(
    dispatcher: AllToAllDispatcher,
    x_TD: Tensor,
    routing: Routing,
    shared: SharedExpert | None = None,
    *,
    beside: bool = False,
) -> Tensor:
    """Runs dispatch and combine with identity experts.

    Args:
        dispatcher: Dispatcher that sends the rows.
        x_TD: ``[T, D]`` tokens.
        routing: Routing of the tokens.
        shared: Shared expert of all tokens; None for none.
        beside: If True the shared expert runs while the rows travel, else once they have arrived.
    """
    handle = dispatcher.start(x_TD, routing)
    early_TD = shared(x_TD) if shared is not None and beside else None
    there = handle.wait()
    late_TD = shared(x_TD) if shared is not None and not beside else None
    summed_N1 = there.weights_NK.sum(1, keepdim=True)
    out_TD = dispatcher.combine((there.rows_ND * summed_N1).to(x_TD.dtype), there)
    for more_TD in (early_TD, late_TD):
        out_TD = out_TD if more_TD is None else out_TD + more_TD
    return out_TD


def _shared_expert(shape: DispatchShape) -> SharedExpert:
    generator = torch.Generator().manual_seed(0)
    up_FD, gate_FD, down_FD = (
        torch.randn(shape.shared_width, shape.width, generator=generator) * shape.width**-0.5
        for _ in range(3)
    )
    return SharedExpert(FFNWeights(up_FD, down_FD.t(), "silu", gate_FD)).to(_DTYPES[shape.dtype])


def measure_rank(shape: DispatchShape, ids_TK: Tensor, rank: int, ranks: int, rounds: int) -> RankFigures:
    """Counts, then times, on one rank of a group that has been joined. Collective.

    Args:
        shape: Shape of the exchange.
        ids_TK: ``[T, K]`` experts of this rank's tokens.
        rank: This one.
        ranks: P.
        rounds: Timed ones.

    Raises:
        AssertionError: The rows that come home are not the tokens that left.
    """
    x_TD = torch.randn(shape.tokens, shape.width, generator=torch.Generator().manual_seed(rank))
    x_TD = x_TD.to(_DTYPES[shape.dtype]).requires_grad_()
    weights_TK = torch.full(ids_TK.shape, 1 / shape.top_k).requires_grad_()
    routing = Routing(ids_TK, weights_TK, shape.experts)
    dispatcher = AllToAllDispatcher(shape.experts, dist.group.WORLD if ranks > 1 else None)

    def forward() -> Tensor:
        return exchange(dispatcher, x_TD, routing)

    def training() -> None:
        forward().backward(torch.ones_like(x_TD))

    expert = _shared_expert(shape)

    def with_shared(*, beside: bool) -> None:
        exchange(dispatcher, x_TD, routing, expert, beside=beside).backward(torch.ones_like(x_TD))

    with WireCounter(shape.width, rank) as sent:
        out_TD = forward()
        there = sent.rows, sent.metadata, sent.calls
        out_TD.backward(torch.ones_like(x_TD))
    # weights add up to 1: what differs is how a few terms are rounded in the rows' own dtype
    error = float((out_TD - x_TD).detach().abs().max() / x_TD.detach().abs().max())
    assert error <= 4 * ranks * torch.finfo(x_TD.dtype).eps, f"rows came home changed by {error:.2e}"
    needed = needed_rows(ids_TK, shape.experts, ranks, rank)
    shared = partial(with_shared, beside=False), partial(with_shared, beside=True)
    times = _timed((forward, training, *shared), rounds, ranks)
    return RankFigures(there[0], there[1], sent.rows, sent.metadata, there[2], needed, *times)


def _timed(runs: Sequence[Callable[[], Any]], rounds: int, ranks: int) -> list[list[float]]:
    """Returns the seconds of every round of each function; a round runs all in turn."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(_WARMUP + rounds):
        for run, found in zip(runs, seconds, strict=True):
            if ranks > 1:
                dist.barrier()
            started = time.perf_counter()
            run()
            if number >= _WARMUP:
                found.append(time.perf_counter() - started)
    return seconds


def _work(rank: int, ranks: int, folder: str, shape: DispatchShape, rounds: int) -> None:
    """Runs one rank and writes its figures to the folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        figures = asdict(measure_rank(shape, shape.ids(rank), rank, ranks, rounds))
        (Path(folder) / f"{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def measure(shape: DispatchShape, ranks: int, rounds: int) -> Scaling:
    """Starts so many processes that talk over gloo, and collects what they measure."""
    with tempfile.TemporaryDirectory(prefix="dispatch-") as folder:
        torch.multiprocessing.start_processes(
            _work, (ranks, folder, shape, rounds), nprocs=ranks, start_method="spawn"
        )
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return summed(shape, [RankFigures(**{**one, "needed": Needed(**one["needed"])}) for one in found])


def summed(shape: DispatchShape, figures: Sequence[RankFigures]) -> Scaling:
    """Sums the figures of all ranks; a round lasts as long as on its slowest rank."""
    both = 2 * shape.row_bytes
    return Scaling(
        len(figures),
        tuple(figures),
        both * sum(one.needed.least for one in figures),
        both * sum(one.needed.slots for one in figures),
        both * sum(one.needed.gathered for one in figures),
        sum(one.rows for one in figures),
        sum(one.metadata for one in figures),
        *(
            summarise([max(times) for times in zip(*(getattr(one, name) for one in figures), strict=True)])
            for name in ("forward", "training", "shared_after", "shared_beside")
        ),
    )


def render(found: Sequence[Scaling], shape: DispatchShape, cores: int) -> str:
    """Formats bytes and times as a table."""
    head = (
        f"{'ranks':>5} {'rows sent':>11}{'least':>9}{'ratio':>7}{'metadata':>10}{'per slot':>10}"
        f"{'all-gather':>12}{'forward ms':>12}{'p10':>8}{'p90':>8}{'+backward':>11}{'p10':>8}{'p90':>8}"
        f"{'+shared':>10}{'p10':>8}{'p90':>8}{'beside':>10}{'p10':>8}{'p90':>8}"
    )
    kib = 2**10
    lines = [
        f"T={shape.tokens} tokens per rank, D={shape.width} {shape.dtype}, E={shape.experts}, "
        f"K={shape.top_k}, {'skewed' if shape.skewed else 'uniform'} routing",
        "KiB that a rank sends to others in forward, mean over ranks: rows there and back, metadata besides;",
        "least: one row for each token and other rank with one of its experts, there and back;",
        "per slot and all-gather: rows that other schemes would send, counted from the same routing, not run",
        f"+shared: forward and backward with a shared expert of width {shape.shared_width} behind the "
        "arrival; beside: with it while the rows travel",
        head,
    ]
    for one in found:
        bytes_each = [one.rows, one.least, one.metadata, one.slots, one.gathered]
        rows, least, metadata, slots, gathered = (value / one.ranks / kib for value in bytes_each)
        ratio = f"{rows / least:7.3f}" if least else f"{'-':>7}"
        timings = one.forward, one.training, one.shared_after, one.shared_beside
        times = [value * 1e3 for t in timings for value in (t.median, t.p10, t.p90)]
        lines.append(
            f"{one.ranks:5} {rows:11.0f}{least:9.0f}{ratio}{metadata:10.1f}{slots:10.0f}{gathered:12.0f}"
            f"{times[0]:12.1f}{times[1]:8.1f}{times[2]:8.1f}{times[3]:11.1f}{times[4]:8.1f}{times[5]:8.1f}"
            + "".join(f"{times[at]:10.1f}{times[at + 1]:8.1f}{times[at + 2]:8.1f}" for at in (6, 9))
        )
    busy = max(one.ranks for one in found)
    lines.append(
        f"One thread per rank, gloo, {cores} cores: "
        + (
            f"{busy} ranks share them, so times do not show how the exchange scales; bytes do."
            if busy >= cores
            else "every rank has a core; links of a cluster are not in these times."
        )
    )
    return "\n".join(lines)
