"""Randomness that depends only on its purpose: alike on every rank, and the same when replayed.

Noise for tokens comes from a counter-based hash instead of a random generator: a token's value follows from
the seed, the step, the micro-batch, the layer, and the token's position among the real tokens of its rank.
Hence recomputation repeats the draws, a resumed run continues them, padding changes nothing, several ranks
draw what one rank would (with equally many tokens each and no padding), CPU and GPU agree, and no generator's
state changes.

Letters: T tokens, N columns (experts, or draws a token).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Generator, Tensor

from moe.types import LayerContext

_BITS32 = 0xFFFFFFFF


def _hash(seed: int, where: tuple[object, ...]) -> int:
    digest = hashlib.blake2b(repr((seed, *where)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(seed: int, *where: object) -> Generator:
    """Returns a CPU generator for one purpose: ``seeded_generator(seed, "router", layer)``."""
    return Generator().manual_seed(_hash(seed, where))


def hashed_uniform(seed: int, *where: object) -> float:
    """Returns a number in [0, 1) for one purpose, such as a (step, layer); recomputation draws the same."""
    return _hash(seed, where) / 2**63


def token_positions(num_tokens: int, mask_T: Tensor | None, device: torch.device) -> Tensor:
    """Returns ``[T]`` int64: the number of real tokens before each token."""
    if mask_T is None:
        return torch.arange(num_tokens, device=device)
    return (mask_T.to(device).cumsum(0) - 1).clamp_min(0)


def uniform_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """Draws ``[T, N]`` fp32, uniform in (0, 1): odd multiples of 2**-24, so that neither end occurs.

    Args:
        seed: Seed of the run.
        purpose: Distinguishes several draws of one forward pass.
        num_tokens: T.
        columns: N.
        ctx: Step, micro-batch, layer, rank and padding.
        device: Device of the noise.
    """
    run = ctx.run
    where = (purpose, run.step, run.micro_batch, ctx.layer_index)
    keys = [int(hashed_uniform(seed, *where, part) * 2**32) for part in (0, 1)]
    rank = 0 if run.group is None else run.group.rank()
    position_T = token_positions(num_tokens, ctx.token_mask_T(num_tokens), device) + rank * num_tokens
    row_T1 = mix32((position_T & _BITS32) ^ keys[0])[:, None]
    # Multiples of an odd number are all different modulo 2**32.
    column_N = torch.arange(columns, device=device) * 0x1E3779B1 & _BITS32
    bits_TN = mix32(((mix32(row_T1 ^ keys[1]) + column_N) & _BITS32) ^ row_T1)
    return ((bits_TN >> 9).float() + 0.5) * 2.0**-23


def mix32(bits: Tensor) -> Tensor:
    """Applies a bijection of 32-bit integers (held in int64) in which any bit flips about half of the result.

    It multiplies by odd numbers below 2**31, so that no product overflows int64, and applies shifted
    exclusive ors. The two multipliers were found by C. Wellons' search for such functions ("hash
    prospector").
    """
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x21F0AAAD) & _BITS32
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x735A2D97) & _BITS32
    return bits ^ (bits >> 15)


def normal_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """Draws ``[T, N]`` fp32, standard normal, within 5.3 of 0: see `uniform_noise`."""
    uniform_TN = uniform_noise(seed, purpose, num_tokens, columns, ctx, device)
    normal_TN: Tensor = torch.special.erfinv(2 * uniform_TN - 1) * math.sqrt(2)
    return normal_TN


def gumbel_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """Draws ``[T, N]`` fp32, standard Gumbel: the argmax of logits plus noise samples their softmax."""
    uniform_TN = uniform_noise(seed, purpose, num_tokens, columns, ctx, device)
    return -(-uniform_TN.log()).log()
