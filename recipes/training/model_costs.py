"""Costs of a token and bytes of a step, from the live model and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.flops import forward_flops_per_token, training_flops_per_token
from moe.accounting.mixers import AttentionShape, Mixer
from moe.accounting.params import ExpertModule, count_parameters, expert_modules
from moe.accounting.router_elements import router_elements
from moe.accounting.shape import attention_from_config
from moe.accounting.training import MoEBlock, StepModel, update_bytes
from moe.attention.routed_attention import attention_layers
from moe.errors import ConfigError
from moe.layer import moe_layers
from recipes.checkpoint import GlobalTensor, global_shape, local_memory
from recipes.runtime.machine_memory import peak_resident_bytes
from recipes.tracking.step_costs import Costs

if TYPE_CHECKING:
    from recipes.engines.base import TrainModule
    from recipes.models.hf.hf_model import HFModel


def measure_costs(
    model: HFModel,
    seq_len: int,
    peak_flops: float | None,
    top_k: Mapping[int, int] | None = None,
) -> Costs:
    """Counts parameters exactly and FLOPs by the ``exact`` convention; call it before the model is sharded.

    FLOPs are None if the accounting does not know the model's attention: they are never guessed. With
    attention experts, a query meets the number of keys expected under uniform routing, see
    `moe.accounting.attention_experts`.

    Args:
        model: The decoder.
        seq_len: Tokens in a sample.
        peak_flops: Peak FLOP/s of one rank's device; None if unknown.
        top_k: Experts a token by layer index, for layers that differ from their router's own number.
    """
    numbers = {
        f"{name}.experts": top_k[layer.context.layer_index]
        for name, layer in moe_layers(model.module)
        if top_k and layer.context.layer_index in top_k
    }
    count = count_parameters(model.module, numbers)
    content: dict[str, Any] = model.config.to_dict()
    forward = training = None
    try:
        attention = _mixers(model, attention_from_config(content))
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


def _mixers(model: HFModel, dense: Sequence[Mixer]) -> list[Mixer]:
    """Returns the attention of every layer, with its attention experts, if any."""
    mixers = list(dense)
    for index, layer in model.attention_layers():
        plain, router = mixers[index], layer.router
        assert isinstance(plain, AttentionShape), plain
        mixers[index] = AttentionExpertsShape(plain, router.top_k, *router_elements(router))
    return mixers


def scheduled_costs(model: HFModel, seq_len: int, peak_flops: float | None) -> tuple[tuple[int, Costs], ...]:
    """Returns the costs of a token from each step at which the schedule changes K; empty without one."""
    if model.schedule is None:
        return ()
    return tuple(
        (start, measure_costs(model, seq_len, peak_flops, model.schedule.at(start)))
        for start in model.schedule.starts
    )


def step_model(model: HFModel) -> StepModel:
    """Returns what a step moves, except its update; call it before the model is sharded.

    The MoE layers are in the order in which the loop reports their load.
    """
    found = {each.name: each for each in expert_modules(model.module)}
    routed = [*moe_layers(model.module), *attention_layers(model.module)]
    experts = [found[f"{name}.experts"] for name, _ in routed]
    routed_params = {id(param) for each in experts for param in each.experts.parameters()}
    count = count_parameters(model.module)
    embeddings = [module for module in model.module.modules() if isinstance(module, nn.Embedding)]
    dense_params = [p for p in model.module.parameters() if id(p) not in routed_params]
    trained = sum(p.numel() for p in dense_params if p.requires_grad)
    return StepModel(
        always=count.total - count.routed - count.looked_up,
        always_trained=max(0, trained - count.looked_up),
        row=sum(module.embedding_dim for module in embeddings),
        moe_blocks=tuple(_moe(each) for each in experts),
        update_bytes=0.0,
    )


def _moe(found: ExpertModule) -> MoEBlock:
    params, experts = list(found.experts.parameters()), found.num_experts
    return MoEBlock(
        num_experts=experts,
        top_k=found.top_k,
        matrix=sum(param.numel() for param in params if param.ndim >= 3) // experts,
        elements=sum(param.numel() for param in params) // experts,
        trained=sum(param.numel() for param in params if param.requires_grad) // experts,
        frozen=sum(p.numel() for p in params if p.ndim >= 3 and not p.requires_grad) // experts,
    )


def local_update_bytes(train_module: TrainModule) -> float:
    """Returns the bytes that the update moves on this rank, for its shard or its whole replica."""
    tensors = train_module.checkpoint_tensors()
    state = {name: t for name, t in tensors.items() if name.startswith("optim.") and global_shape(t)}
    # The state of a parameter is sharded as its update is, and has the same dtype.
    weights = {name.rpartition(".")[0]: _local_bytes(t) for name, t in state.items()}
    updated = sum(weights.values())
    return update_bytes(updated, sum(map(_local_bytes, state.values())), updated)


def _local_bytes(tensor: GlobalTensor) -> int:
    return sum(memory.nbytes for memory in local_memory(tensor))


def expert_readers(model: HFModel) -> tuple[int, ...]:
    """Returns the number of ranks that share the experts of each MoE layer; empty without such sharing."""
    ranks = tuple(layer.experts.ranks for _, layer in model.moe_layers())
    return ranks + (1,) * len(model.attention_layers()) if any(each > 1 for each in ranks) else ()


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the largest resident memory of this process so far, or on a GPU its largest allocation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
