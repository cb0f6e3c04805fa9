"""EfficientLLM's six metrics, as far as a run of inference has them.

Source: Z. Yuan et al., "EfficientLLM: Efficiency in Large Language Models", arXiv:2505.13840, section 5.1,
equations 1 to 9: memory utilisation (AMU), compute utilisation (PCU), latency (AL), throughput (TT of
pre-training, ST of fine-tuning, IT of inference), energy (AEC) and compression rate (MCR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.cap.accuracy import share_right
from recipes.tracking.meters import Reading

KEYS = ("amu", "pcu", "al_s", "tt", "st", "it_tokens_per_s", "aec_watts")
_TRAINS = "a rate of training, and nothing is trained here"
Figures = Mapping[str, Any]


def efficiency(
    point: Figures, memory: Reading, total_memory: float | None, peak_flops: float | None
) -> dict[str, Any]:
    """Computes all metrics but MCR of one batch size; None, with the reason, where unknown.

    - AMU: memory in use, mean over time, over all there is.
    - PCU: FLOPs that the tokens need over what the device could do meanwhile, prefill and decode together.
    - AL: mean time of a request from its first byte to its last token.
    - IT: tokens written per second.
    - AEC: mean power in watts.

    Args:
        point: The figures of the batch size so far.
        memory: Mean bytes in use.
        total_memory: Bytes of the device.
        peak_flops: FLOP/s of the device.
    """
    phases = [point["prefill"], point["decode"]]
    work = [phase["flops"] for phase in phases]
    amu = pcu = None
    if memory.value is not None and total_memory is not None:
        amu = memory.value / total_memory
    if peak_flops is not None and None not in work:
        pcu = sum(work) / sum(phase["seconds"] for phase in phases) / peak_flops
    values = (
        amu,
        pcu,
        point["request_s"] and point["request_s"]["mean"],
        None,
        None,
        point["tokens_per_s"],
        point["energy"]["watts"],
    )
    found = dict(zip(KEYS, values, strict=True))
    why = {
        "amu": memory.detail,
        "pcu": "the peak FLOP/s or the FLOPs are not known",
        "tt": _TRAINS,
        "st": _TRAINS,
        "aec_watts": point["energy"]["detail"],
    }
    reasons = {key: why.get(key, point["reason"]) for key, value in found.items() if value is None}
    return found | {"reasons": reasons}


def compression(systems: Sequence[Figures]) -> list[dict[str, Any]]:
    """Computes the MCR of every system against the first: ratio of sizes times share of accuracy kept.

    An MoE made from the first is larger, so its rate is below 1.
    """
    first = systems[0]
    base_size, base_right = first["weights"]["held_bytes"], share_right(first["accuracy"])
    rates = []
    for system in systems:
        size, right = system["weights"]["held_bytes"], share_right(system["accuracy"])
        rate = reason = None
        if not base_right or right is None:
            reason = "no accuracy to compare: give --choices or --answers"
        elif not base_size or not size:
            reason = "the size of the weights is not known"
        else:
            rate = base_size / size * right / base_right
        rates.append({"mcr": rate, "mcr_against": first["name"], "mcr_reason": reason})
    return rates
