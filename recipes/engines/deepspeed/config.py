"""Options of the DeepSpeed engine, and the configuration that DeepSpeed itself is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import Mistake
from recipes.engines.config import ProcessConfig

if TYPE_CHECKING:
    from recipes.engines.optim.config import OptimConfig
    from recipes.engines.run_options import RunOptions

_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class DeepSpeedConfig(ProcessConfig):
    """Options of `DeepSpeedEngine`."""

    name: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Sharded over the ranks: 1 the optimizer state, 2 also the gradients, 3 also the weights."""

    def check_optimizer(self, optim: OptimConfig) -> list[Mistake]:
        """Requires AdamW: ZeRO splits parameters at any element, and Muon needs whole matrices."""
        if optim.name == "adamw":
            return []
        rule = (
            "engine=deepspeed splits matrices over the ranks at any element, and this optimizer needs whole "
            "matrices"
        )
        return [Mistake("optim.name", optim.name, rule, "Set optim=adamw, or engine=native.")]

    def check_run(self, run: RunOptions) -> list[Mistake]:
        """Rejects frozen weights under ZeRO-3 with expert parallelism: DeepSpeed loses track of them."""
        rank = run.experts.lora.rank
        if not (rank and self.zero_stage == 3 and self.expert_parallel > 1):
            return []
        rule = "DeepSpeed's ZeRO-3 cannot shard expert-parallel experts if some of their weights are frozen"
        remedy = "Set engine.zero_stage=2 or engine.expert_parallel=1, or experts.lora.rank=0."
        return [Mistake("experts.lora.rank", rank, rule, remedy)]


def make_ds_config(zero_stage: int, precision: str, elements: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, in which everything that Graft does itself is off.

    Graft clips, so that the norm counts each parameter once, also with experts on several ranks.
    Micro-batches are announced one by one. Low precision is autocast over fp32 weights, as in the native
    engine's ``ddp``: the router stays fp32, and the weights are their own masters.

    Args:
        zero_stage: 0 to 3.
        precision: ``fp32`` or ``bf16``.
        elements: Number of elements of the model; buckets need not be larger.
    """
    bucket = max(2, min(_BUCKET_ELEMENTS, elements + elements % 2))
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": bucket}
    if zero_stage in (1, 2):
        zero |= {"compute_grad_norm": False, "contiguous_gradients": True, "reduce_scatter": True}
        zero |= {"allgather_bucket_size": bucket}
    if zero_stage == 3:
        # Weights that stay gathered would have to be gathered again when a checkpoint is read.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket // 10}
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        # The gradients of modules that are named here would be reduced in bf16.
        ds_config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return ds_config
