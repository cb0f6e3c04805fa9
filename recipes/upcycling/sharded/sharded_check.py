"""Equivalence check at step 0 on shards: no rank holds the dense model or the MoE model whole.

Letters: B samples, S sequence length, D model width.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe.upcycle.equivalence import LayerDrift, layer_drift, logit_drift, require_exact
from recipes.models.hf.deferred_init import DonatedWeights, WeightSource
from recipes.models.hf.ffn_blocks import dense_ffn
from recipes.models.hf.ffn_surgery import SurgeryReport
from recipes.models.hf.load_entropy import load_entropies
from recipes.upcycling.sharded.align import output_gain, scale_outputs
from recipes.upcycling.sharded.sharded_models import dense_model, moe_model
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights, read_network

if TYPE_CHECKING:
    from moe.layer import MoELayer
    from moe.routing.top_k_schedule import TopKSchedule
    from recipes.engines import Engine
    from recipes.models.hf.ffn_names import FFNNames
    from recipes.models.hf.hf_model import HFModel
    from recipes.upcycling.convert.moe_plan import MoEPlan


@torch.no_grad()
def measure_shards(
    engine: Engine[Any],
    plan: MoEPlan,
    tokens_BS: Tensor,
    backend: str = "auto",
    schedule: TopKSchedule | None = None,
) -> tuple[SurgeryReport, WeightSource]:
    """Builds the MoE model and measures if it computes the same. All ranks call it together.

    The dense model is sharded over the ranks in fp32, measured and freed, then the MoE model. Each layer's
    dense network is read once more, whole, to compare its MoE layer with it. Engines that train a model as
    they hold it get the measured one; for others it is freed, and made once more from the plan.

    Args:
        engine: Engine of the ranks.
        plan: Plan of the MoE model.
        tokens_BS: ``[B, S]`` real tokens, the same on all ranks.
        backend: Back end of the experts.
        schedule: Schedule of the experts a token uses.

    Returns:
        The report, and the weights that were measured, for `moe_model` of the same plan.

    Raises:
        ExactnessError: The method claims to be exact under this router and is not.
    """
    assert plan.model is not None, "what comes from a checkpoint is not measured"
    report, gains, model = _measured(engine, plan, tokens_BS, backend, schedule)
    if not engine.trains_as_sharded:
        # FSDP2's modules hold one another: without this they would be there while the rest is made.
        del model
        gc.collect()
        return report, UpcycledWeights(plan.model, plan, gains)
    if gains is not None:
        scale_outputs(model, gains)
    return report, DonatedWeights(model.module)


def _measured(
    engine: Engine[Any], plan: MoEPlan, tokens_BS: Tensor, backend: str, schedule: TopKSchedule | None
) -> tuple[SurgeryReport, dict[int, Tensor] | None, HFModel]:
    """Returns the report, the gains of the layers' outputs if asked for, and the model without them."""
    files = plan.model
    assert files is not None, plan
    tokens_BS = tokens_BS.to(engine.device)
    dense_logits = _logits(engine, dense_model(files, **_trust(plan)), tokens_BS)
    gc.collect()
    model = moe_model(plan, backend)
    model.schedule = schedule
    drifts: list[LayerDrift] = []
    gains: dict[int, Tensor] | None = {} if plan.method.aligns_outputs else None
    layers = [layer for _, layer in model.moe_layers()]
    with _measuring(layers, plan, drifts, gains), load_entropies(layers) as loads:
        moe_logits = _logits(engine, model, tokens_BS)
    files.close()
    logits = logit_drift(dense_logits, moe_logits)
    method = plan.method
    if plan.claims_exact:
        require_exact(method.name, logits, drifts, moe_logits.dtype)
    indices = tuple(ffn.layer for ffn in plan.ffns)
    report = SurgeryReport(method.name, indices, plan.claims_exact, logits, tuple(drifts), tuple(loads))
    return report, gains, model


def _trust(plan: MoEPlan) -> dict[str, bool]:
    return {"trust_remote_code": plan.request.trust_remote_code}


def _logits(engine: Engine[Any], model: HFModel, tokens_BS: Tensor) -> Tensor:
    engine.shard_for_eval(model)
    logits: Tensor = model.module(input_ids=tokens_BS).logits
    return logits


@contextmanager
def _measuring(
    layers: list[MoELayer], plan: MoEPlan, drifts: list[LayerDrift], gains: dict[int, Tensor] | None
) -> Iterator[None]:
    """Compares every pass of an MoE layer with its dense network on the same input while open.

    Where gains are asked for, what follows sees the outputs as they will be.
    """
    model = plan.model
    assert model is not None, plan

    def hook(ffn: FFNNames) -> Any:
        def compare(files: MoELayer, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            dense = dense_ffn(args[0], read_network(model, ffn, out.device))
            if gains is not None:
                gains[ffn.layer] = output_gain(dense, out)
                out = out * gains[ffn.layer].to(out)
            drifts.append(layer_drift(ffn.layer, dense, out))
            return out

        return compare

    handles = [layer.register_forward_hook(hook(f)) for f, layer in zip(plan.ffns, layers, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
