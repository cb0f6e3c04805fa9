"""How much of the hardware a run uses."""

from __future__ import annotations

import warnings


def mfu(flops_per_token: float, tokens_per_s: float, peak_flops: float, world_size: int = 1) -> float:
    """Model FLOPs utilisation: FLOPs that the model needs, over those the devices could do in that time.

    Source: A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B. Recomputation is not work done.

    Args:
        flops_per_token: In training, `moe.accounting.flops.training_flops_per_token`, whose convention the
            result has.
        tokens_per_s: Of all devices together.
        peak_flops: Of one device in FLOP/s, see `moe.accounting.peaks.peak_for`.
        world_size: Devices.

    Returns:
        A share, normally in [0, 1]. Above 1 it warns, with what is then usually wrong.

    Raises:
        ValueError: A peak or number of devices that is not above 0, or a negative rate.
    """
    if not peak_flops > 0 or world_size < 1:
        raise ValueError(
            f"peak_flops={peak_flops} and world_size={world_size} must be above 0. Measure the peak."
        )
    if not flops_per_token >= 0 or not tokens_per_s >= 0:
        raise ValueError(
            f"flops_per_token={flops_per_token}, tokens_per_s={tokens_per_s} must not be negative."
        )
    share = flops_per_token * tokens_per_s / (peak_flops * world_size)
    if share > 1:
        warnings.warn(
            f"MFU is {share:.2f}, above 1: the peak is of another device or dtype (or was measured while the "
            "machine was busy), tokens are counted twice, or the clock does not wait for the device.",
            stacklevel=2,
        )
    return share
