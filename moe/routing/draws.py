"""Randomness that depends on what it is for and on nothing else: alike on every rank and when replayed."""

from __future__ import annotations

import hashlib

from torch import Generator


def _hash(seed: int, where: tuple[object, ...]) -> int:
    digest = hashlib.blake2b(repr((seed, *where)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(seed: int, *where: object) -> Generator:
    """A CPU generator for one purpose: ``seeded_generator(seed, "router", layer)``."""
    return Generator().manual_seed(_hash(seed, where))


def hashed_uniform(seed: int, *where: object) -> float:
    """A number in [0, 1) for one purpose, such as a (step, layer): recomputation draws the same."""
    return _hash(seed, where) / 2**63
