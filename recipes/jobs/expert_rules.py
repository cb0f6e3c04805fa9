"""Rules of the experts' back end and low-rank factors, checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kernels.backend import Workload
from kernels.expert_mlp import BACKENDS
from kernels.third_party import THIRD_PARTY
from moe.errors import Mistake
from moe.experts.lora import rank_unsupported_reason
from moe.upcycle.dense_shape import FFNShape
from recipes.config.schema import RunConfig

RANK_PATH = "experts.lora.rank"


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


def check_low_rank(config: RunConfig, shape: FFNShape | None) -> list[Mistake]:
    """Rejects low-rank factors that cannot be, or that would not belong to the exported model.

    Args:
        config: The run.
        shape: Shape of the dense network, where it is known. Experts may be narrower:
            `recipes.models.lora_model` looks at them again.
    """
    rank = config.experts.lora.rank
    if not rank:
        return []
    mistakes = []
    if config.router.reads_experts:
        rule = "it reads the experts' weights, which do not change beside low-rank factors and do on export"
        remedy = "Choose another router, or set experts.lora.rank=0."
        mistakes.append(Mistake("router.name", config.router.name, rule, remedy))
    if config.optim.start_from is not None:
        rule = "it holds the state of weights that do not train beside low-rank factors"
        mistakes.append(
            Mistake("optim.start_from", config.optim.start_from, rule, f"Set null, or {RANK_PATH}=0.")
        )
    if shape is None:
        return mistakes
    unsupported_reason = rank_unsupported_reason(rank, shape.model_width, shape.width)
    if unsupported_reason is not None:
        remedy = f"Set {min(shape.model_width, shape.width)} or less; 8 to 64 are usual."
        mistakes.append(Mistake(RANK_PATH, rank, unsupported_reason, remedy))
    return mistakes + _check_backend(config, shape)


def _check_backend(config: RunConfig, shape: FFNShape) -> list[Mistake]:
    """Rejects a forced back end that cannot run the rank; what else it rejects is not about the rank."""
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


def refuse_low_rank(config: RunConfig, who: str) -> list[Mistake]:
    """Rejects low-rank factors in a job that has none.

    Args:
        config: The run.
        who: Reason, as a clause.
    """
    rank: Any = config.experts.lora.rank
    return [Mistake(RANK_PATH, rank, who, "Set it to 0.")] if rank else []
