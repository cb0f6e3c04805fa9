"""Rules of a forced back end of the experts, checked before anything starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.backend import Workload
from kernels.expert_mlp import BACKENDS
from kernels.third_party import THIRD_PARTY
from moe.errors import Mistake
from moe.upcycle.dense_shape import FFNShape
from recipes.config.schema import RunConfig
from recipes.jobs.low_rank_rules import RANK_PATH

# A width that every back end takes: experts may be narrower than the dense network, as its plan tells.
_WIDTH = 1024


def check_backend(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Rejects a forced back end that this machine does not have, or that cannot compute such experts.

    Whether it can run their widths is known once the model is: `kernels.expert_mlp.choose_backend` says so.

    Args:
        config: The run.
        shape: Shape of the dense network, where it is known.
    """
    name, rank = config.experts.backend, config.experts.lora.rank
    if name == "auto":
        return []
    backend, remedy = BACKENDS[name], "Set experts.backend=auto."
    if name in THIRD_PARTY and THIRD_PARTY[name].missing() is not None:
        remedy = "Install it, or set experts.backend=auto."
    reason = backend.unsupported_reason(_work(config, shape))
    if reason is None and shape is not None and rank:
        work = replace(_work(config, shape), model_width=shape.model_width, expert_width=shape.width)
        # What else it rejects of the dense network's own width is not about the rank.
        if backend.unsupported_reason(work) is None:
            reason = backend.unsupported_reason(replace(work, low_rank=rank))
        remedy = f"Set another {RANK_PATH}, or experts.backend=auto."
    return [] if reason is None else [Mistake("experts.backend", name, reason, remedy)]


def _work(config: RunConfig, shape: FFNShape | None) -> Workload:
    """Returns a layer of the run as far as it is known."""
    engine = config.engine
    kind = getattr(engine, "device_type", lambda: "cpu")()
    shape = shape or FFNShape(_WIDTH, _WIDTH, gated=True, activation="silu")
    return Workload(
        device=torch.device(kind),
        dtype=torch.bfloat16 if getattr(engine, "precision", "fp32") == "bf16" else torch.float32,
        num_experts=config.upcycle.num_experts // getattr(engine, "expert_parallel", 1),
        model_width=_WIDTH,
        expert_width=_WIDTH,
        activation=shape.activation,
        has_bias=shape.up_bias or shape.down_bias,
        gated=shape.gated,
    )
