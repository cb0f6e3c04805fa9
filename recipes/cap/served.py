"""Measures a model behind a server: speed as a client sees it, experts as it records them, or their bound.

Letters: B requests, S tokens, R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe.accounting.distinct import estimated_distinct
from moe.accounting.passes import decode_batch
from moe.accounting.utilisation import Machine
from moe.errors import ModelError
from recipes.cap.cost import Rates, cost_figures
from recipes.cap.efficiency import efficiency
from recipes.cap.engine.recorded_passes import TimedPass, begin_record, end_record, timed
from recipes.cap.loading import Known
from recipes.cap.measure import Workload, spread_of, unmeasured_point
from recipes.cap.phases import Passes, phase_figures, unmeasured_phase
from recipes.cap.server import Reply, Server, ask_together, most_together, together
from recipes.tracking.meters import Reading

# Requests that decode together on average, of those asked for; below it no utilisation is given.
_TOGETHER = 0.9
_OTHER_MACHINE = "not measured on the server's machine"
_NO_PASSES = "its passes were not recorded (--server-experts), and a queue delays the first token"


def measure_served(
    server: Server, known: Known, prompts_RBS: Tensor, work: Workload, machine: Machine, rates: Rates
) -> dict[str, Any]:
    """Measures all figures of one batch size that a client can see; others are None, with the reason.

    Args:
        server: Address of the server.
        known: Facts of the accounting.
        prompts_RBS: Other prompts in every round, so that no cache of prefixes answers; the first round is to
            warm up.
        work: Lengths and rounds.
        machine: Its peaks.
        rates: Costs of an hour.

    Raises:
        ModelError: The server cannot be reached, or refuses.
    """
    _, B, S = prompts_RBS.shape
    point: dict[str, Any] = {"batch_size": B, "prompt": S, "new": work.new, "rounds": work.rounds}
    rounds, passes = _ask(server, known, prompts_RBS, work.new)
    failed = [reply.error for replies in rounds for reply in replies if reply.error is not None]
    requests = {"attempted": len(rounds) * B, "failed": len(failed)}
    if failed:
        if len(failed) == requests["attempted"]:
            remedy = "Look at the server's log, --server and --model."
            raise ModelError.one("--server", server.url, f"every request failed: {failed[0]}", remedy)
        reason = f"{len(failed)} of {requests['attempted']} requests failed: {failed[0]}"
        return point | unmeasured_point(rates, reason) | {"requests": requests}
    told = rounds[1:]
    at_once = min(together(replies) for replies in told)
    written = _written(told, work.new)
    point |= {
        "reason": None,
        "requests": requests,
        "reached_batch_size": at_once,
        "ttft_s": spread_of([reply.first for replies in told for reply in replies]),
        "tpot_s": spread_of([reply.each for replies in told for reply in replies]),
        "request_s": spread_of([reply.arrived[-1] - reply.sent for replies in told for reply in replies]),
        "tokens_per_s": written,
        "prefill": unmeasured_phase(_NO_PASSES),
        "decode": _decode(known, told, B, S, work.new, machine, at_once),
        "cache": dict.fromkeys(("held_bytes", "counted_bytes")),
        "memory": {"peak_bytes": None, "detail": _OTHER_MACHINE},
        "energy": {"joules": None, "joules_per_token": None, "watts": None, "detail": _OTHER_MACHINE},
        "cost": cost_figures(rates, written, None),
    }
    if passes is not None:
        point |= _recorded(known, passes, machine, B, _apart(told, B, at_once))
    return point | {"efficientllm": efficiency(point, Reading(None, _OTHER_MACHINE), None, machine.flops)}


def _ask(
    server: Server, known: Known, prompts_RBS: Tensor, new: int
) -> tuple[list[list[Reply]], list[TimedPass] | None]:
    """Asks in rounds; returns the replies, and the passes of all rounds but the first if it records them."""
    first, *others = prompts_RBS.tolist()
    rounds = [ask_together(server, first, new)]
    if server.records:
        begin_record(server, known.shape)
    rounds += [ask_together(server, prompts_BS, new) for prompts_BS in others]
    return rounds, timed(end_record(server)) if server.records else None


def _recorded(
    known: Known, passes: Sequence[TimedPass], machine: Machine, sequences: int, apart: str
) -> dict[str, Any]:
    """Computes the figures of the passes as they ran: of prompts, and those that decode the whole batch."""
    read = [one for one in passes if not one.recorded.decodes]
    decoded = [one for one in passes if one.recorded.decodes and len(one.recorded.names) == sequences]
    return {
        "prefill": _phase(known, read, machine) if read else unmeasured_phase("no pass read a prompt alone"),
        "decode": _phase(known, decoded, machine) if decoded else unmeasured_phase(apart),
    }


def _phase(known: Known, passes: Sequence[TimedPass], machine: Machine) -> dict[str, Any]:
    distinct = tuple(one.recorded.distinct for one in passes)
    run = Passes(seconds=tuple(one.seconds for one in passes), distinct=distinct)
    return phase_figures(known, [run], slice(None), [one.recorded.batch for one in passes], machine)


def _written(rounds: Sequence[Sequence[Reply]], new: int) -> float:
    """Returns tokens/s from the first request sent to the last token, of all rounds together."""
    seconds = [
        max(reply.arrived[-1] for reply in replies) - min(reply.sent for reply in replies)
        for replies in rounds
    ]
    return new * sum(len(replies) for replies in rounds) / sum(seconds)


def _apart(rounds: Sequence[Sequence[Reply]], sequences: int, at_once: float) -> str:
    """Returns what is known of requests that did not all decode at once."""
    most = min(most_together(replies) for replies in rounds)
    starts = [[reply.arrived[0] for reply in replies] for replies in rounds]
    late = max(max(first) - min(first) for first in starts)
    known = f"{at_once:.1f} of {sequences} requests decoded at once on average, and {most} at most"
    begun = f"first tokens came up to {late:.2g} s apart"
    if most == sequences:
        return f"{known}: {begun}, so ask for more tokens (--new)"
    return f"{known}; {begun} (a smaller batch on the server, or its queue)"


def _decode(
    known: Known,
    rounds: Sequence[Sequence[Reply]],
    sequences: int,
    prompt: int,
    new: int,
    machine: Machine,
    at_once: float,
) -> dict[str, Any]:
    """Treats every round as ``new - 1`` passes of the whole batch, each with the mean time of a token."""
    if at_once < _TOGETHER * sequences:
        return unmeasured_phase(_apart(rounds, sequences, at_once))
    times = [sum(reply.each for reply in replies) / len(replies) for replies in rounds]
    distinct = None if known.shape is None else (estimated_distinct(known.shape, sequences),) * (new - 1)
    runs = [Passes(seconds=(seconds,) * (new - 1), distinct=distinct) for seconds in times]
    batches = [decode_batch(sequences, prompt + i + 1) for i in range(new - 1)]
    return phase_figures(known, runs, slice(None), batches, machine)
