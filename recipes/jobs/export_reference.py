"""Reference of an export: the trained weights in the files' dtypes, run in fp32 on any engine.

Engines compute in bf16 at will, and files may hold fewer bits than what was trained. The check of an export
is about neither, so both are taken out of it; what the files' dtype costs is measured apart.

Letters: B samples, S sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipes.jobs.rounding import (
    RoundingCost,
    Start,
    SurvivalCount,
    loses_bits,
    rounded,
    rounding_cost,
    run_model,
    written_dtypes,
)
from recipes.models.export.spec import describe_model
from recipes.models.hf.deferred_init import refill
from recipes.models.hf.state_dict_map import StateDictMap, kept_specs
from recipes.models.lora_model import factors_of, model_lora, without_factors

if TYPE_CHECKING:
    from recipes.engines.base import Engine, TrainModule
    from recipes.models.export import Exporter
    from recipes.models.hf.hf_model import HFModel


@torch.no_grad()
def reference_logits(
    engine: Engine[Any],
    blank: HFModel,
    train_module: TrainModule,
    exporter: Exporter,
    dtype: torch.dtype,
    tokens_BS: Tensor,
    begin: Callable[[], Start] | None,
) -> tuple[Tensor, RoundingCost | None]:
    """Computes what the export of a trained model must compute. All ranks call it together.

    Args:
        engine: The open engine.
        blank: A model of its shapes with any weights, without low-rank factors; sharded in fp32 and filled.
        train_module: The trained model.
        exporter: The format, which keeps the dtype of some tensors.
        dtype: Dtype of the other tensors in the files.
        tokens_BS: ``[B, S]`` real tokens, the same on all ranks.
        begin: Returns the weights at step 0, to say what is left of the training; None where nothing has
            been trained, and costs are not asked for.

    Returns:
        The ``[B, S, V]`` logits in fp32 on the CPU, and what rounding costs; None for files in fp32.
    """
    skeleton, device_BS = train_module.skeleton, tokens_BS.to(engine.device)
    spec = describe_model(skeleton)
    dtypes = written_dtypes(spec, kept_specs(skeleton, StateDictMap(spec)), exporter, dtype)
    blank.context.step = train_module.model.context.step
    engine.shard_for_eval(blank)
    costs = begin is not None and loses_bits(dtypes.values())
    if costs:
        refill(blank.module, _merged(train_module))
        trained = run_model(blank, device_BS)
    count = SurvivalCount(begin) if costs and engine.rank == 0 else None
    refill(blank.module, rounded(_merged(train_module), dtypes, count))
    found = run_model(blank, device_BS)
    if not costs:
        return found[0], None
    survival = engine.broadcast(None if count is None else count.result())
    return found[0], rounding_cost(dtype, trained, found, tokens_BS, survival)


def _merged(train_module: TrainModule) -> Iterator[tuple[str, Tensor]]:
    """Yields the trained tensors, with low-rank factors merged into their weights."""
    model = train_module.skeleton
    factors = factors_of(describe_model(model), model_lora(model))
    return without_factors(train_module.full_tensors(), factors, computes=True)
