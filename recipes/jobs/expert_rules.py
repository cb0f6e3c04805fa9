"""Rules of the experts' back end, checked before anything starts."""

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


def check_library(config: RunConfig) -> list[Mistake]:
    """Rejects a forced back end of another library that is missing, or of an unknown version.

    Whether it can run the layers is known once the model is: `kernels.expert_mlp.choose_backend` says so.
    """
    backend = config.experts.backend
    unsupported_reason = THIRD_PARTY[backend].missing() if backend in THIRD_PARTY else None
    if unsupported_reason is None:
        return []
    return [
        Mistake("experts.backend", backend, unsupported_reason, "Install it, or set experts.backend=auto.")
    ]


def check_rank(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Rejects a forced back end that cannot run the rank; what else it rejects is not about the rank.

    Args:
        config: The run.
        shape: Shape of the dense network, where it is known.
    """
    if shape is None or not config.experts.lora.rank:
        return []
    backend, engine = config.experts.backend, config.engine
    kind = getattr(engine, "device_type", lambda: "cpu")()
    work = Workload(
        device=torch.device(kind),
        dtype=torch.bfloat16 if getattr(engine, "precision", "fp32") == "bf16" else torch.float32,
        num_experts=config.upcycle.num_experts,
        model_width=shape.model_width,
        expert_width=shape.width,
        activation=shape.activation,
        has_bias=shape.up_bias or shape.down_bias,
    )
    if backend == "auto" or BACKENDS[backend].unsupported_reason(work) is not None:
        return []
    unsupported_reason = BACKENDS[backend].unsupported_reason(
        replace(work, low_rank=config.experts.lora.rank)
    )
    if unsupported_reason is None:
        return []
    remedy = f"Set another {RANK_PATH}, or experts.backend=auto."
    return [Mistake("experts.backend", backend, unsupported_reason, remedy)]
