"""Noise for every token and column that depends on what it is for, and on nothing else.

A counter-based hash in place of a random generator: the value of a token follows from the seed, the step,
the micro-batch, the layer, and the position of the token among the real tokens of its rank. Hence
recomputation draws the same again, a resumed run goes on with the same draws, padding moves nothing, the
ranks draw what one rank would (where they have equally many tokens and no padding), CPU and GPU agree, and
no generator's state changes.

Letters: T tokens, N columns (experts, or draws a token).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.routing.draws import hashed_uniform
from moe.types import LayerContext

_BITS32 = 0xFFFFFFFF


def token_positions(num_tokens: int, mask_T: Tensor | None, device: torch.device) -> Tensor:
    """``[T]`` int64: how many real tokens stand before each token; padding does not count."""
    if mask_T is None:
        return torch.arange(num_tokens, device=device)
    return (mask_T.to(device).cumsum(0) - 1).clamp_min(0)


def uniform_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """``[T, N]`` fp32, uniform in (0, 1): an odd multiple of 2**-24, so neither end is met.

    Args:
        seed: Of the run.
        purpose: Tells several draws of one forward pass apart.
        num_tokens: T.
        columns: N.
        ctx: Step, micro-batch, layer, rank and padding.
        device: Where the noise is wanted.
    """
    run = ctx.run
    where = (purpose, run.step, run.micro_batch, ctx.layer_index)
    keys = [int(hashed_uniform(seed, *where, part) * 2**32) for part in (0, 1)]
    rank = 0 if run.group is None else run.group.rank()
    position_T = token_positions(num_tokens, ctx.token_mask_T(num_tokens), device) + rank * num_tokens
    row_T1 = mix32((position_T & _BITS32) ^ keys[0])[:, None]
    # Odd multiples of one number are as many different numbers modulo 2**32.
    column_N = torch.arange(columns, device=device) * 0x1E3779B1 & _BITS32
    bits_TN = mix32(((mix32(row_T1 ^ keys[1]) + column_N) & _BITS32) ^ row_T1)
    return ((bits_TN >> 9).float() + 0.5) * 2.0**-23


def mix32(bits: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) that flips about half of the bits for any one flipped.

    Multiplications by odd numbers below 2**31, so that no product leaves int64, and shifted exclusive ors.
    The two multipliers are constants found by C. Wellons' search for such functions ("hash prospector").
    """
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x21F0AAAD) & _BITS32
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x735A2D97) & _BITS32
    return bits ^ (bits >> 15)


def normal_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """``[T, N]`` fp32, standard normal, within 5.3 of 0: see `uniform_noise`."""
    uniform_TN = uniform_noise(seed, purpose, num_tokens, columns, ctx, device)
    normal_TN: Tensor = torch.special.erfinv(2 * uniform_TN - 1) * math.sqrt(2)
    return normal_TN


def gumbel_noise(
    seed: int, purpose: str, num_tokens: int, columns: int, ctx: LayerContext, device: torch.device
) -> Tensor:
    """``[T, N]`` fp32, standard Gumbel: the argmax of logits plus it is a sample of their softmax."""
    uniform_TN = uniform_noise(seed, purpose, num_tokens, columns, ctx, device)
    return -(-uniform_TN.log()).log()
