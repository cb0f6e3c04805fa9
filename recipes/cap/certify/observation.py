"""Observations of a program: its log-probabilities, and the experts of every token in every layer.

Programs run in environments of their own, so an observation is a folder of plain arrays.

Letters: S tokens of a sequence, V vocabulary, K experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_GREEDY = "greedy.json"


@dataclass(frozen=True)
class SequenceObservation:
    """Observation of one sequence.

    Attributes:
        first: Position of the first row; rows before it are not known.
        log_probs_SV: ``[S - first, V]`` fp32 log-probabilities of the token after each position.
        floor_S: ``[S - first]`` smallest log-probability that is told; a token with it may have less.
            None where it tells all.
        experts_SK: Block index -> ``[S, K]`` experts of each token; empty where a program does not tell them.
        weights_SK: Block index -> ``[S, K]`` their weights, in the order of the experts.
    """

    first: int
    log_probs_SV: np.ndarray
    floor_S: np.ndarray | None = None
    experts_SK: Mapping[int, np.ndarray] = field(default_factory=dict)
    weights_SK: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """Observation of a program on the tokens of a certificate.

    Attributes:
        version: Name and version of the program.
        sequences: The tokens.
        found: What was computed, by sequence.
        greedy: Tokens that it generates after the beginning of each sequence; empty where it was not asked.
    """

    version: str
    sequences: Sequence[Sequence[int]]
    found: Sequence[SequenceObservation]
    greedy: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Request:
    """Request to compute on some tokens.

    Attributes:
        sequences: Tokens, some sequences of one length.
        prompt_length: Tokens of each sequence that a generation goes on from.
        new_tokens: Tokens to generate.
        pinned: Folder of an observation whose experts and weights take the place of the router's; None
            leaves the choice to the router.
    """

    sequences: Sequence[Sequence[int]]
    prompt_length: int
    new_tokens: int
    pinned: Path | None = None


def log_softmax(logits_SV: np.ndarray) -> np.ndarray:
    """Returns fp32 log-probabilities of logits."""
    shifted_SV = logits_SV.astype(np.float32) - logits_SV.max(-1, keepdims=True)
    log_probs: np.ndarray = shifted_SV - np.log(np.exp(shifted_SV).sum(-1, keepdims=True, dtype=np.float64))
    return log_probs.astype(np.float32)


def write_routing(folder: Path, number: int, found: SequenceObservation) -> None:
    """Writes the experts and weights of a sequence, to pin those of another program."""
    arrays = {f"experts/{layer}": x for layer, x in found.experts_SK.items()}
    arrays |= {f"weights/{layer}": x for layer, x in found.weights_SK.items()}
    np.savez(folder / f"routing_{number}.npz", **arrays)


def read_routing(folder: Path, number: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns the experts and weights of a sequence, by block."""
    with np.load(folder / f"routing_{number}.npz") as arrays:
        layers = {int(name.partition("/")[2]) for name in arrays.files}
        return {n: (arrays[f"experts/{n}"], arrays[f"weights/{n}"]) for n in sorted(layers)}


def read_worker_output(folder: Path, sequences: Sequence[Sequence[int]]) -> Observation:
    """Reads what a worker in another environment has written."""
    head = json.loads((folder / _GREEDY).read_text(encoding="utf-8"))
    found = []
    for number in range(len(sequences)):
        with np.load(folder / f"sequence_{number}.npz") as arrays:
            experts = {int(n.partition("/")[2]): arrays[n] for n in arrays.files if n.startswith("experts/")}
            found.append(SequenceObservation(0, log_softmax(arrays["logits"]), experts_SK=experts))
    return Observation(head["version"], sequences, found, head["greedy"])
