"""Equivalence check at step 0: on shards, so that no rank holds a whole MoE model, or in the memory of one.

The dense side is loaded by transformers, once, on rank 0.

Letters: B samples, S sequence length, D model width.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe.errors import ExactnessError
from moe.upcycle.equivalence import (
    TOLERANCES,
    LayerDrift,
    LogitDrift,
    agree,
    layer_drift,
    logit_drift,
    require_exact,
)
from recipes.engines.console import RankConsole
from recipes.models.hf.deferred_init import DonatedWeights, WeightSource
from recipes.models.hf.drift import SurgeryReport
from recipes.models.hf.ffn_blocks import dense_ffn
from recipes.models.hf.load_entropy import load_entropies
from recipes.runtime.machine_memory import collect
from recipes.upcycling.convert.dense_side import DenseSide, dense_side
from recipes.upcycling.convert.folder_check import describe_tokens
from recipes.upcycling.sharded.align import output_gain, scale_outputs
from recipes.upcycling.sharded.sharded_models import dense_model, materialize, moe_model
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights, read_network

if TYPE_CHECKING:
    from moe.layer import MoELayer
    from moe.routing.top_k_schedule import TopKSchedule
    from recipes.engines.base import Engine
    from recipes.models.hf.ffn_names import FFNNames
    from recipes.models.hf.hf_model import HFModel
    from recipes.upcycling.convert.moe_plan import MoEPlan


@dataclass(frozen=True)
class Measurement:
    """Dense model and MoE model on the same tokens.

    Attributes:
        report: Differences between them.
        logits: Logits of the MoE model.
        gains: Gains of the layers' outputs by block, if the method asks for them.
        model: The MoE model, without these gains.
    """

    report: SurgeryReport
    logits: Tensor
    gains: dict[int, Tensor] | None
    model: HFModel

    def require_exact(self) -> None:
        """Checks what the method claims.

        Raises:
            ExactnessError: The method claims to be exact under this router and is not.
        """
        report = self.report
        if report.claimed_exact:
            require_exact(report.method, report.logits, report.drifts, self.logits.dtype)


@torch.no_grad()
def measure_shards(
    engine: Engine[Any],
    plan: MoEPlan,
    tokens_BS: Tensor,
    backend: str = "auto",
    schedule: TopKSchedule | None = None,
) -> tuple[SurgeryReport, WeightSource]:
    """Builds the MoE model and measures if it computes the same. All ranks call it together.

    Rank 0 has transformers load the dense model in fp32, whole where it fits, runs it and frees it; then the
    MoE model is sharded over the ranks. Each layer's dense network is read once more, whole, to compare its
    MoE layer with it. Engines that train a model as they hold it get the measured one; for others it is
    freed, and made once more from the plan.

    Args:
        engine: Engine of the ranks.
        plan: Plan of the MoE model.
        tokens_BS: ``[B, S]`` real tokens, the same on all ranks.
        backend: Back end of the experts.
        schedule: Schedule of the experts a token uses.

    Returns:
        The report, and the weights that were measured, for `moe_model` of the same plan.

    Raises:
        ExactnessError: The method claims to be exact under this router and is not, or Graft reads another
            dense model than transformers does.
    """
    assert plan.model is not None, "what comes from a checkpoint is not measured"
    found = _measure(engine, plan, tokens_BS, engine.shard_for_eval, backend, schedule)
    report, gains = found.report, found.gains
    if not engine.trains_as_sharded:
        # FSDP2's modules hold one another: without this they would be there while the rest is made.
        del found
        gc.collect()
        return report, UpcycledWeights(plan.model, plan, gains)
    if gains is not None:
        scale_outputs(found.model, gains)
    return report, DonatedWeights(found.model.module)


@torch.no_grad()
def measure_whole(
    engine: Engine[Any],
    plan: MoEPlan,
    tokens_BS: Tensor,
    backend: str = "auto",
    schedule: TopKSchedule | None = None,
) -> tuple[SurgeryReport, HFModel]:
    """Builds the whole MoE model in the memory of each rank, and measures if it computes the same.

    Args:
        engine: See `measure_shards`.
        plan: See `measure_shards`.
        tokens_BS: See `measure_shards`.
        backend: See `measure_shards`.
        schedule: See `measure_shards`.

    Raises:
        ExactnessError: See `measure_shards`.
    """
    found = _measure(engine, plan, tokens_BS, materialize, backend, schedule)
    if found.gains is not None:
        scale_outputs(found.model, found.gains)
    return found.report, found.model


def _measure(
    engine: Engine[Any],
    plan: MoEPlan,
    tokens_BS: Tensor,
    fill: Callable[[HFModel], object],
    backend: str,
    schedule: TopKSchedule | None,
) -> Measurement:
    """Measures on all ranks, with the dense side on the first alone, and checks what is claimed."""
    folder, trust = plan.request.dense, plan.request.trust_remote_code
    console = RankConsole(engine)
    kept: list[DenseSide] = []

    def run_dense() -> str:
        kept.append(dense_side(folder, tokens_BS, trust_remote_code=trust))
        return kept[0].loader

    def compare(logits: Tensor) -> LogitDrift:
        return console.on_rank_zero(lambda: logit_drift(kept[0].logits, logits.cpu()))

    loader, words = console.on_rank_zero(run_dense), describe_tokens(folder, tokens_BS)
    tokens_BS = tokens_BS.to(engine.device)
    if not plan.claims_exact:
        # An exact MoE model shows what the reader got wrong; of others any drift is accepted.
        _require_reader(plan, tokens_BS, fill, compare)
    found = measure(plan, tokens_BS, fill, compare, backend, schedule)
    found.require_exact()
    return replace(found, report=replace(found.report, loader=loader, tokens=words))


def _require_reader(
    plan: MoEPlan,
    tokens_BS: Tensor,
    fill: Callable[[HFModel], object],
    compare: Callable[[Tensor], LogitDrift],
) -> None:
    assert plan.model is not None, plan
    model = dense_model(plan.model, trust_remote_code=plan.request.trust_remote_code)
    drift = compare(_logits(fill, model, tokens_BS))
    # FSDP2's modules hold one another: without this they would be there while the MoE model is made.
    released = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    del model
    collect(released)
    if not agree(drift, torch.float32):
        raise ExactnessError(
            f"Graft does not read {plan.request.dense} as transformers does: the dense model's logits differ "
            f"by {drift.relative:.2e} of the largest, KL {drift.kl:.1e}, and at most "
            f"{TOLERANCES[torch.float32]:.0e} is allowed. Nothing was trained"
        )


@torch.no_grad()
def measure(
    plan: MoEPlan,
    tokens_BS: Tensor,
    fill: Callable[[HFModel], object],
    compare: Callable[[Tensor], LogitDrift],
    backend: str = "auto",
    schedule: TopKSchedule | None = None,
) -> Measurement:
    """Runs the MoE model, and compares it with the dense one.

    Args:
        plan: Plan of the MoE model.
        tokens_BS: ``[B, S]`` real tokens, on the device of the model.
        fill: Gives the model its weights, sharded or whole.
        compare: Compares logits with those of the dense model.
        backend: Back end of the experts.
        schedule: Schedule of the experts a token uses.
    """
    files = plan.model
    assert files is not None, plan
    model = moe_model(plan, backend)
    model.schedule = schedule
    drifts: list[LayerDrift] = []
    gains: dict[int, Tensor] | None = {} if plan.method.aligns_outputs else None
    layers = [layer for _, layer in model.moe_layers()]
    with _measuring(layers, plan, drifts, gains), load_entropies(layers) as loads:
        moe_logits = _logits(fill, model, tokens_BS)
    files.close()
    logits = compare(moe_logits)
    indices = tuple(ffn.layer for ffn in plan.ffns)
    report = SurgeryReport(plan.method.name, indices, plan.claims_exact, logits, tuple(drifts), tuple(loads))
    return Measurement(report, moe_logits, gains, model)


def _logits(fill: Callable[[HFModel], object], model: HFModel, tokens_BS: Tensor) -> Tensor:
    fill(model)
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
