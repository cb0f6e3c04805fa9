"""Models without memory, dense or MoE, that know the source of their weights.

Letters: D model width, E experts, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import ExpertBank, FFNWeights
from moe.layer import MoELayer
from moe.types import LayerContext
from recipes.models.hf.deferred_init import CheckpointWeights, WeightSource, deferred_model
from recipes.models.hf.hf_model import HFModel, source_dtype
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights

if TYPE_CHECKING:
    from moe.upcycle.layer_plan import FFNShape
    from recipes.models.export.spec import ModelSpec, MoESpec
    from recipes.models.hf.ffn_names import ModelNames
    from recipes.upcycling.convert.moe_plan import MoEPlan, StoredModel

_CPU = torch.device("cpu")


def dense_model(model: StoredModel, *, trust_remote_code: bool = False) -> HFModel:
    """Returns the dense decoder; each rank will read its part of it."""
    weights = UpcycledWeights(model)
    return model_of(model.names, model.files[0].folder, weights, trust_remote_code=trust_remote_code)


def moe_model(plan: MoEPlan, backend: str = "auto", weights: WeightSource | None = None) -> HFModel:
    """Returns the MoE model; each rank will make its part of it.

    Args:
        plan: Plan of the MoE model.
        backend: Back end of the experts.
        weights: Where parameters come from instead; routers begin as planned in any case.
    """
    if weights is None:
        weights = CheckpointWeights() if plan.model is None else UpcycledWeights(plan.model, plan)
    model = model_of(
        plan.names, plan.request.dense, weights, trust_remote_code=plan.request.trust_remote_code
    )
    insert_moe_layers(model, plan.spec, backend)
    return model


def insert_moe_layers(model: HFModel, spec: ModelSpec, backend: str = "auto") -> None:
    """Replaces modules of a decoder by MoE layers, whose experts have no memory yet."""
    for moe in spec.moe_blocks:
        parent, _, child = moe.site.rpartition(".")
        setattr(model.module.get_submodule(parent), child, _moe(moe, model, backend))


def materialize(model: HFModel, device: torch.device = _CPU) -> HFModel:
    """Gives a model all of its weights on this rank; returns it."""
    assert model.weights is not None, "a model without a source has its weights"
    model.weights.give(model.module, device)
    model.weights = None
    return model


def model_of(
    names: ModelNames, folder: Path, weights: WeightSource, *, trust_remote_code: bool = False
) -> HFModel:
    """Returns a model as transformers builds it, whose weights a source will fill."""
    # A copy: to build a model in fp32 is to say so in its config.
    model = deferred_model(copy.deepcopy(names.config), trust_remote_code=trust_remote_code)
    return HFModel(
        module=model,
        folder=folder,
        source_dtype=source_dtype(names.config),
        weights=weights,
        trust_remote_code=trust_remote_code,
    )


def _moe(spec: MoESpec, model: HFModel, backend: str) -> MoELayer:
    # A copy: the plan may be carried out again, after this router has been cut into shards.
    router = copy.deepcopy(spec.router)
    experts = Experts(_bank(spec.expert, spec.num_experts), backend)
    gate = torch.empty(1, spec.expert.model_width, device="meta") if spec.shared_gate else None
    shared = SharedExpert(_network(spec.expert, spec.shared_width), gate) if spec.shared_width else None
    layer = MoELayer(router, LocalDispatcher(), experts, LayerContext(model.context, spec.index), shared)
    return layer.eval()


def _bank(shape: FFNShape, num_experts: int) -> ExpertBank:
    E, D, F = num_experts, shape.model_width, shape.width
    U = 2 * F if shape.gated else F
    with torch.device("meta"):
        return ExpertBank(
            w_up_EUD=torch.empty(E, U, D),
            w_down_EDF=torch.empty(E, D, F),
            activation=shape.activation,
            gated=shape.gated,
            b_up_EU=torch.empty(E, U) if shape.up_bias else None,
            b_down_ED=torch.empty(E, D) if shape.down_bias else None,
        )


def _network(shape: FFNShape, width: int) -> FFNWeights:
    F, D = width, shape.model_width
    with torch.device("meta"):
        return FFNWeights(
            up_FD=torch.empty(F, D),
            down_DF=torch.empty(D, F),
            activation=shape.activation,
            gate_FD=torch.empty(F, D) if shape.gated else None,
            b_gate_F=torch.empty(F) if shape.gated and shape.up_bias else None,
            b_up_F=torch.empty(F) if shape.up_bias else None,
            b_down_D=torch.empty(D) if shape.down_bias else None,
        )
