"""The configuration that DeepSpeed is given."""

from __future__ import annotations

from typing import Any

_BUCKET_ELEMENTS = 500_000_000


def settings(zero_stage: int, precision: str, elements: int) -> dict[str, Any]:
    """What DeepSpeed is told; what it could do as well and Graft does itself, is off.

    Clipping is Graft's, so that the norm is that of all parameters, each counted once, with experts on
    several ranks as well. Micro-batches are announced one by one. Low precision is autocast's over fp32
    weights, as in the native engine's ``ddp``: the router stays fp32, and the weights are their own masters.

    Args:
        zero_stage: 0 to 3.
        precision: ``fp32`` or ``bf16``.
        elements: Of the largest parameter list that is reduced at once: buffers need not be larger.
    """
    bucket = max(2, min(_BUCKET_ELEMENTS, elements + elements % 2))
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": bucket}
    if zero_stage in (1, 2):
        zero |= {"compute_grad_norm": False, "contiguous_gradients": True, "reduce_scatter": True}
        zero |= {"allgather_bucket_size": bucket}
    if zero_stage == 3:
        # Weights that stay gathered would have to be gathered anew when a checkpoint is read.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket // 10}
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        # No module is named whose gradients would travel in bf16.
        told["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return told
