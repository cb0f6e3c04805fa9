"""Tensor parallelism of the native engine: each of ``tp`` neighbouring ranks holds a slice of the heads.

The plan comes from transformers (``base_model_tp_plan``) and is applied by torch's `parallelize_module`. The
ranks see the same samples. Each sends its share of an MoE layer's tokens to the experts; everything else is
computed on all of them.

Letters: D model width, H width of all heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moe.dispatch import Dispatcher
from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.same_tokens import SameTokensDispatcher
from moe.errors import Mistake, ModelError
from recipes.engines.native.config import head_mistakes
from recipes.engines.optim.muon import local_part
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel

_PATH = "engine.tensor_parallel"
_REMEDY = "Set engine.tensor_parallel=1, or take another model."
_ENTRY = re.compile(r"layers\.\*\.(\w*att\w*)\.(\w+)")
_COLUMNS, _ROWS, _WHOLE = "colwise", "rowwise", "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class AttentionMeshes:
    """Device meshes of the attention.

    Attributes:
        dp: Ranks that hold the same heads: the last axis shards them, an axis before that replicates them.
        tp: Ranks that together hold all heads, on one axis.
    """

    dp: DeviceMesh
    tp: DeviceMesh

    def sample_group(self) -> ProcessGroup:
        """Returns the ranks that hold the same heads; together they see every sample once. Collective."""
        return (self.dp if self.dp.ndim == 1 else self.dp._flatten()).get_group()


@dataclass(frozen=True)
class AttentionPlan:
    """Tensor-parallel plan of a family's attention.

    Attributes:
        module: Name of the attention in a block.
        columns: Projections whose outputs are sharded.
        rows: The projection whose inputs are sharded.
        whole: Replicated modules, of whose gradients each rank computes a part.
    """

    module: str
    columns: frozenset[str]
    rows: str
    whole: frozenset[str]


def attention_plan(model_type: str) -> AttentionPlan | None:
    """Returns the plan that transformers has for a family; None if it has none, or one unknown here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    entries = getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None) or {}
    found = {name: style for name, style in entries.items() if re.search("att", name)}
    matches = {name: _ENTRY.fullmatch(name) for name in found}
    if not found or not all(matches.values()):
        return None
    modules = {match[1] for match in matches.values() if match}
    by_style: dict[str, set[str]] = {_COLUMNS: set(), _ROWS: set(), _WHOLE: set()}
    for name, match in matches.items():
        if match is None or found[name] not in by_style:
            return None
        by_style[found[name]].add(match[2])
    if len(modules) != 1 or len(by_style[_ROWS]) != 1:
        return None
    return AttentionPlan(
        modules.pop(), frozenset(by_style[_COLUMNS]), by_style[_ROWS].pop(), frozenset(by_style[_WHOLE])
    )


def attention_mistakes(dense: Mapping[str, Any], ways: int) -> list[Mistake]:
    """Returns the reasons why the attention of a model cannot be sharded, from its ``config.json`` alone.

    Args:
        dense: The content of the file.
        ways: Number of tensor-parallel ranks.
    """
    if ways == 1:
        return []
    family = (dense.get("text_config") or dense).get("model_type") or dense.get("model_type")
    if attention_plan(str(family)) is not None:
        return head_mistakes(dense, ways)
    rule = f"transformers has no plan that shards the attention of {family!r} by whole heads"
    return [Mistake(_PATH, ways, rule, _REMEDY)]


def apply_tp(model: HFModel, meshes: AttentionMeshes, policy: MixedPrecisionPolicy) -> list[nn.Module]:
    """Shards the attention heads of every block, and each slice over the ranks that hold the same one.

    Call it before FSDP2 shards a module that contains attention.

    Args:
        model: With the same weights on all ranks.
        meshes: Of all ranks.
        policy: Dtype of the projections.

    Returns:
        The replicated modules, of whose gradients each rank computes the part of its heads.

    Raises:
        ModelError: The attention differs from the plan of transformers.
    """
    ways = meshes.tp.size()
    dense = model.config.to_dict()
    if mistakes := attention_mistakes(dense, ways):
        raise ModelError(mistakes)
    plan = attention_plan(str(model.config.get_text_config().model_type))
    assert plan is not None, "attention_mistakes rejects families without a plan"
    partial_modules: list[nn.Module] = []
    sharded = 0
    for block in decoder_blocks(model.module, model.config):
        attention = getattr(block, plan.module, None)
        if attention is None or not hasattr(attention, plan.rows):
            continue  # a block that mixes tokens by other means stays whole
        _require_known(attention, plan, ways)
        styles = {name: ColwiseParallel() for name in plan.columns if hasattr(attention, name)}
        parallelize_module(attention, meshes.tp, {**styles, plan.rows: RowwiseParallel()}, src_data_rank=None)
        attention.register_forward_pre_hook(partial(_wrap_input, meshes.tp), with_kwargs=True)
        # FSDP2 hooks onto the output, which must not be a view: a change in place would drop the hook.
        attention.get_submodule(plan.rows).register_forward_hook(lambda module, args, out: out.clone())
        projections = [attention.get_submodule(name) for name in (*sorted(styles), plan.rows)]
        fully_shard(
            projections,
            mesh=meshes.dp,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: _shard_dim(parameter, meshes.dp),
        )
        whole = [name for name in sorted(plan.whole) if hasattr(attention, name)]
        partial_modules += [attention.get_submodule(name) for name in whole]
        sharded += 1
    if not sharded:
        rule = f"no block of the model has {plan.module}.{plan.rows}"
        raise ModelError.one(_PATH, ways, rule, _REMEDY)
    return partial_modules


def _wrap_input(tp: DeviceMesh, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Marks the hidden states as replicated, once for all projections.

    Otherwise each projection would do so, and reduce its part of their gradient over the ranks by itself.
    """

    def wrapped(hidden: Any) -> Any:
        return DTensor.from_local(hidden, tp, [Replicate()], run_check=False)

    if args:
        return (wrapped(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": wrapped(kwargs["hidden_states"])}


def _require_known(attention: nn.Module, plan: AttentionPlan, ways: int) -> None:
    """Requires that the plan names every parameter, and that sharded modules are plain linear layers."""
    named = plan.columns | plan.whole | {plan.rows}
    unknown = [name for name, _ in attention.named_parameters() if name.partition(".")[0] not in named]
    odd = [
        name
        for name in sorted(plan.columns | {plan.rows})
        if hasattr(attention, name) and type(getattr(attention, name)) is not nn.Linear
    ]
    if unknown or odd:
        rule = f"it is not known how to shard {', '.join(unknown + odd)} of {type(attention).__name__}"
        raise ModelError.one(_PATH, ways, rule, _REMEDY)


def _shard_dim(parameter: nn.Parameter, dp: DeviceMesh) -> Shard:
    """Returns the axis that FSDP2 shards: the one that tensor parallelism left whole, if it divides."""
    assert isinstance(parameter, DTensor), type(parameter)
    rows_taken = parameter.placements[0] == Shard(0) and parameter.ndim > 1
    even = rows_taken and parameter.shape[1] % dp.size(dp.ndim - 1) == 0
    return Shard(1 if even else 0)


def split_tokens(model: HFModel, tp: DeviceMesh, ep: DeviceMesh | None) -> list[nn.Module]:
    """Makes each rank send its share of the tokens to the experts, and returns the experts.

    Args:
        model: After expert parallelism, if any.
        tp: Ranks that see the same samples.
        ep: Ranks that together hold all experts; None without expert parallelism.
    """
    found: list[nn.Module] = []
    for _, layer in model.moe_layers():
        inner: Dispatcher = LocalDispatcher()
        if ep is not None:
            inner = AllToAllDispatcher(layer.router.num_experts, ep.get_group())
        layer.set_dispatcher(SameTokensDispatcher(inner, tp.get_group()))
        found.append(layer.experts)
    return found


@torch.no_grad()
def sum_partial_gradients(modules: Iterable[nn.Module], ways: int) -> None:
    """Turns FSDP2's means over all ranks into sums over the ranks that compute parts of a gradient."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, float(ways))


def share_random_state(device: torch.device, group: ProcessGroup) -> None:
    """Copies the random state of the first rank to all, so that they compute the same. Collective.

    Args:
        device: Of this rank.
        group: Ranks that see the same samples.
    """
    first = dist.get_global_rank(group, 0)
    state = torch.get_rng_state()
    dist.broadcast(state, src=first, group=group)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        dist.broadcast(state, src=first, group=group)
        torch.cuda.set_rng_state(state, device)
