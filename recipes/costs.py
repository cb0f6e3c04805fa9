"""What a host costs a token, from the live module and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe.accounting.flops import forward_flops_per_token, training_flops_per_token
from moe.accounting.params import count_parameters
from moe.accounting.shape import attention_from_config
from moe.errors import ConfigError
from moe.layer import moe_layers
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.loop import Costs
from recipes.resident import peak_resident_bytes


def measure_costs(
    host: HuggingFaceHost,
    seq_len: int,
    peak_flops: float | None,
    top_k: Mapping[int, int] | None = None,
) -> Costs:
    """Counts parameters exactly and FLOPs by the ``exact`` convention; call it before the model is sharded.

    FLOPs are None where the accounting does not know the host's attention: they are never guessed. With
    attention experts the keys that a query meets are those of the tokens that went to the same head, which
    depends on the text.

    Args:
        host: The decoder.
        seq_len: Tokens a sample.
        peak_flops: Of one rank's device; None when unknown.
        top_k: Layer index to experts a token, where that is another number than the router's own.
    """
    numbers = {
        f"{name}.experts": top_k[layer.context.layer_index]
        for name, layer in moe_layers(host.model)
        if top_k and layer.context.layer_index in top_k
    }
    count = count_parameters(host.model, numbers)
    content: dict[str, Any] = host.config.to_dict()
    forward = training = None
    try:
        attention = None if host.attention_layers() else attention_from_config(content)
    except ConfigError:
        attention = None
    if attention is not None:
        forward = forward_flops_per_token(count, attention, seq_len)
        training = training_flops_per_token(count, attention, seq_len)
    return Costs(
        total_params=count.total,
        active_params=count.active,
        flops_per_token_forward=forward,
        flops_per_token_train=training,
        peak_flops=peak_flops,
    )


def scheduled_costs(
    host: HuggingFaceHost, seq_len: int, peak_flops: float | None
) -> tuple[tuple[int, Costs], ...]:
    """What a token costs from each step on at which the host's schedule changes K; empty without one."""
    if host.schedule is None:
        return ()
    return tuple(
        (start, measure_costs(host, seq_len, peak_flops, host.schedule.at(start)))
        for start in host.schedule.starts
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The largest resident memory of this process so far, or on a GPU its largest allocation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
