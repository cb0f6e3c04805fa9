"""The certificate of an export: what each program computes, against the trainer, on the same tokens."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe.errors import GraftError
from recipes.cap.certify.base import Consumer
from recipes.cap.certify.differences import Agreement, compare, greedy_agreement, same_experts
from recipes.cap.certify.observation import Observation, Request, write_routing

#: A program is certified where its distributions are this near to the trainer's: mean KL divergence in nats,
#: and the largest difference of a log-probability. fp32 sums in another order stay far below; one wrong flag
#: of a router does not.
MAX_MEAN_KL, MAX_LOGPROB_DIFF = 1e-5, 1e-2
#: llama.cpp's file of log-probabilities has steps of 16 / 65535, and a floor.
COARSE_MEAN_KL = 1e-3


@dataclass(frozen=True)
class ConsumerResult:
    """Outcome of a program.

    Attributes:
        name: Of the program.
        version: Its version; empty where it failed.
        free: Agreement with its own routing; None where it failed.
        pinned: Agreement with the trainer's experts and weights; None where it takes none.
        same_experts: Block index -> share of tokens with the trainer's set of experts.
        greedy: Generated tokens that agree, and of how many; None where it was not asked.
        certified: Whether it computes what the trainer does.
        reason: Why not, or what limits the statement; empty for none.
    """

    name: str
    version: str = ""
    free: Agreement | None = None
    pinned: Agreement | None = None
    same_experts: Mapping[int, float] | None = None
    greedy: tuple[int, int] | None = None
    certified: bool = False
    reason: str = ""

    def lines(self) -> list[str]:
        """Returns what a user should know of it."""
        if self.free is None:
            return [f"{self.name}: not certified: {self.reason}"]
        free = self.free
        words = [f"KL {free.mean_kl:.1e} (largest {free.max_kl:.1e})"]
        words.append(f"log-probabilities within {free.max_logprob_diff:.1e}")
        words.append(f"perplexity {free.perplexity:.4f} (trainer {free.reference_perplexity:.4f})")
        if self.same_experts:
            least, worst = min((share, layer) for layer, share in self.same_experts.items())
            share = sum(self.same_experts.values()) / len(self.same_experts)
            words.append(f"same experts {share:.4%} (layer {worst}: {least:.4%})")
        if self.pinned is not None:
            words.append(f"with experts pinned KL {self.pinned.mean_kl:.1e}")
        if self.greedy is not None:
            words.append(f"greedy {self.greedy[0]}/{self.greedy[1]}")
        verdict = "certified" if self.certified else "NOT certified"
        more = f"; {self.reason}" if self.reason else ""
        return [f"{self.version}: {verdict}: {', '.join(words)}{more}"]


@dataclass(frozen=True)
class Certificate:
    """Outcomes of all programs for an export.

    Attributes:
        model: The folder.
        reference: What it is compared with.
        text: What the tokens are.
        tokens: Number of tokens.
        results: By program.
    """

    model: str
    reference: str
    text: str
    tokens: int
    results: tuple[ConsumerResult, ...]

    def content(self) -> dict[str, Any]:
        """Returns what the file has."""
        found = asdict(self)
        found["limits"] = {"mean_kl": MAX_MEAN_KL, "logprob_diff": MAX_LOGPROB_DIFF}
        return found


def certify(
    folder: Path,
    reference: Callable[[Request], Observation],
    consumers: Sequence[Consumer],
    request: Request,
    log: Callable[[str], None],
) -> tuple[ConsumerResult, ...]:
    """Runs an export in every program, and compares each with the trainer.

    Args:
        folder: The export.
        reference: Computes what the trainer computes on tokens.
        consumers: The programs.
        request: The tokens.
        log: Takes a line on each.
    """
    mine = reference(request)
    results = []
    with tempfile.TemporaryDirectory(prefix="graft-certify-") as scratch:
        pinned = Path(scratch) / "pinned"
        pinned.mkdir()
        for number, found in enumerate(mine.found):
            write_routing(pinned, number, found)
        for consumer in consumers:
            log(f"{consumer.name}: loading and computing")
            work = Path(scratch) / consumer.name
            result = _one(consumer, folder, reference, mine, replace(request, pinned=pinned), work)
            for line in result.lines():
                log(line)
            results.append(result)
    return tuple(results)


def _one(
    consumer: Consumer,
    folder: Path,
    reference: Callable[[Request], Observation],
    mine: Observation,
    request: Request,
    work: Path,
) -> ConsumerResult:
    (work / "free").mkdir(parents=True)
    (work / "pinned").mkdir()
    try:
        theirs = consumer.observe(folder, replace(request, pinned=None), work / "free")
        if not consumer.tells_experts:
            again = reference(Request(theirs.sequences, 0, 0))
            return _coarse(consumer.name, theirs.version, compare(again, theirs))
        once_more = replace(request, new_tokens=0)
        pinned = compare(mine, consumer.observe(folder, once_more, work / "pinned"))
    except GraftError as error:  # of the program, or of what reads the export for it
        return ConsumerResult(consumer.name, reason=str(error))
    free, experts = compare(mine, theirs), same_experts(mine, theirs)
    if not math.isfinite(free.mean_kl + pinned.mean_kl):
        return _not_finite(consumer.name, theirs.version)
    certified = free.mean_kl <= MAX_MEAN_KL and free.max_logprob_diff <= MAX_LOGPROB_DIFF
    reason = "" if certified else _reason(free, pinned)
    return ConsumerResult(
        consumer.name,
        theirs.version,
        free,
        pinned,
        experts,
        greedy_agreement(mine, theirs),
        certified,
        reason,
    )


def _not_finite(name: str, version: str) -> ConsumerResult:
    return ConsumerResult(name, version, reason="its log-probabilities are not finite")


def _coarse(name: str, version: str, free: Agreement) -> ConsumerResult:
    if not math.isfinite(free.mean_kl):
        return _not_finite(name, version)
    certified = free.mean_kl <= COARSE_MEAN_KL and free.max_logprob_diff <= MAX_LOGPROB_DIFF
    reason = "it tells no experts, and log-probabilities in steps of 2.4e-4 only"
    return ConsumerResult(name, version, free, certified=certified, reason=reason)


def _reason(free: Agreement, pinned: Agreement) -> str:
    """Says where a difference comes from: from the choice of experts, or from what they compute."""
    if pinned.mean_kl <= MAX_MEAN_KL:
        return "its router chooses or weighs otherwise: with the trainer's experts and weights it is the same"
    if pinned.mean_kl < 0.5 * free.mean_kl:
        return "its router chooses or weighs otherwise, and so do other parts"
    return "it differs with the trainer's experts and weights, too: not (only) the router"
