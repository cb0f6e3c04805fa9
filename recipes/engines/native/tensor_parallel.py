"""Tensor parallelism of the native engine: neighbouring ranks hold a slice of the heads of attention each.

Which projections are cut, and how, is what transformers says of a family (``base_model_tp_plan``); torch's
`parallelize_module` cuts them. The ranks see the same samples. Of a mixture's tokens each sends a share to
the experts; everything else all compute alike.

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
from recipes.engines.optim.muon import local_part
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel

_PATH = "engine.tensor_parallel"
_REMEDY = "Set engine.tensor_parallel=1, or take another model."
_ENTRY = re.compile(r"layers\.\*\.(\w*att\w*)\.(\w+)")
_COLUMNS, _ROWS, _WHOLE = "colwise", "rowwise", "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class AttentionMeshes:
    """The ranks as attention sees them.

    Attributes:
        copies: Ranks that hold the same heads: the last axis cuts them, an axis before that holds copies.
        ranks: One axis of ranks that hold all heads between them.
    """

    copies: DeviceMesh
    ranks: DeviceMesh

    def samples(self) -> ProcessGroup:
        """The ranks that hold the same heads: between them every sample is seen once. Collective."""
        return (self.copies if self.copies.ndim == 1 else self.copies._flatten()).get_group()


@dataclass(frozen=True)
class AttentionPlan:
    """How the attention of a family is cut.

    Attributes:
        module: Name of the attention in a block.
        columns: Projections whose outputs are cut.
        rows: The projection whose inputs are cut.
        whole: Modules that every rank holds, and of whose gradients each has a part.
    """

    module: str
    columns: frozenset[str]
    rows: str
    whole: frozenset[str]


def attention_plan(model_type: str) -> AttentionPlan | None:
    """What transformers says of a family; None where it says nothing, or more than is known here."""
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
    """Why the attention of a model cannot be cut so many ways, from its ``config.json`` alone.

    Args:
        dense: The content of the file.
        ways: Ranks.
    """
    if ways == 1:
        return []
    text = dense.get("text_config") or dense
    family = text.get("model_type") or dense.get("model_type")
    if attention_plan(str(family)) is None:
        rule = f"transformers does not say how attention of {family!r} is cut by whole heads alone"
        return [Mistake(_PATH, ways, rule, _REMEDY)]
    heads = text.get("num_attention_heads") or 0
    counts = {"attention": heads, "key-value": text.get("num_key_value_heads") or heads}
    return [
        Mistake(_PATH, ways, f"the {count} {what} heads do not divide over so many ranks", _REMEDY)
        for what, count in counts.items()
        if count % ways
    ]


def cut_attention(model: HFModel, grid: AttentionMeshes, policy: MixedPrecisionPolicy) -> list[nn.Module]:
    """Leaves each rank its heads of every block, cut over the ranks that hold the same ones.

    To be called before anything that holds attention is sharded.

    Args:
        model: With the same weights on all ranks.
        grid: Of all ranks.
        policy: Of the projections.

    Returns:
        Modules that every rank holds, and of whose gradients each computes the part of its heads.

    Raises:
        ModelError: The attention is not what transformers says of the family.
    """
    ways = grid.ranks.size()
    dense = model.config.to_dict()
    if mistakes := attention_mistakes(dense, ways):
        raise ModelError(mistakes)
    plan = attention_plan(str(model.config.get_text_config().model_type))
    assert plan is not None, "attention_mistakes refuses families without a plan"
    in_part: list[nn.Module] = []
    cut = 0
    for block in decoder_blocks(model.module, model.config):
        attention = getattr(block, plan.module, None)
        if attention is None or not hasattr(attention, plan.rows):
            continue  # a block that mixes tokens by other means stays whole
        _require_known(attention, plan, ways)
        styles = {name: ColwiseParallel() for name in plan.columns if hasattr(attention, name)}
        parallelize_module(
            attention, grid.ranks, {**styles, plan.rows: RowwiseParallel()}, src_data_rank=None
        )
        attention.register_forward_pre_hook(partial(_wrap_input, grid.ranks), with_kwargs=True)
        # FSDP2 hooks onto the output: that must not be a view, which a change in place would take it from.
        attention.get_submodule(plan.rows).register_forward_hook(lambda module, args, out: out.clone())
        projections = [attention.get_submodule(name) for name in (*sorted(styles), plan.rows)]
        fully_shard(
            projections,
            mesh=grid.copies,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: _cut_dim(parameter, grid.copies),
        )
        in_part += [attention.get_submodule(name) for name in sorted(plan.whole) if hasattr(attention, name)]
        cut += 1
    if not cut:
        rule = f"no block of the model has {plan.module}.{plan.rows}"
        raise ModelError.one(_PATH, ways, rule, _REMEDY)
    return in_part


def _wrap_input(ranks: DeviceMesh, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Tells the hidden states to be the same on all ranks, once for all projections.

    Each would tell it by itself else, and sum its part of their gradient over the ranks by itself.
    """

    def wrapped(hidden: Any) -> Any:
        return DTensor.from_local(hidden, ranks, [Replicate()], run_check=False)

    if args:
        return (wrapped(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": wrapped(kwargs["hidden_states"])}


def _require_known(attention: nn.Module, plan: AttentionPlan, ways: int) -> None:
    """Every parameter must be one that the plan speaks of, and what is cut must be plain linear layers."""
    named = plan.columns | plan.whole | {plan.rows}
    unknown = [name for name, _ in attention.named_parameters() if name.partition(".")[0] not in named]
    odd = [
        name
        for name in sorted(plan.columns | {plan.rows})
        if hasattr(attention, name) and type(getattr(attention, name)) is not nn.Linear
    ]
    if unknown or odd:
        rule = f"{', '.join(unknown + odd)} of {type(attention).__name__}: it is not known how to cut such"
        raise ModelError.one(_PATH, ways, rule, _REMEDY)


def _cut_dim(parameter: nn.Parameter, copies: DeviceMesh) -> Shard:
    """The axis that FSDP2 cuts: that which tensor parallelism has left whole, where it divides."""
    assert isinstance(parameter, DTensor), type(parameter)
    rows_taken = parameter.placements[0] == Shard(0) and parameter.ndim > 1
    even = rows_taken and parameter.shape[1] % copies.size(copies.ndim - 1) == 0
    return Shard(1 if even else 0)


def share_tokens(model: HFModel, ranks: DeviceMesh, experts: DeviceMesh | None) -> list[nn.Module]:
    """Lets each rank send its share of the tokens to the experts; returns these.

    Args:
        model: Whose experts are spread already, where they are.
        ranks: One axis of ranks that see the same samples.
        experts: One axis of ranks that hold all experts between them; None where each rank holds all.
    """
    found: list[nn.Module] = []
    for _, layer in model.moe_layers():
        inner: Dispatcher = LocalDispatcher()
        if experts is not None:
            inner = AllToAllDispatcher(layer.router.num_experts, experts.get_group())
        layer.set_dispatcher(SameTokensDispatcher(inner, ranks.get_group()))
        found.append(layer.experts)
    return found


@torch.no_grad()
def add_partial_gradients(modules: Iterable[nn.Module], ways: int) -> None:
    """Makes sums over the ranks that share heads of what FSDP2 has left: means over all ranks."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, float(ways))


def share_random_state(device: torch.device, group: ProcessGroup) -> None:
    """Lets all ranks draw what the first one draws: they compute the same of the same samples. Collective.

    Args:
        device: Of this rank.
        group: The ranks that see the same samples.
    """
    first = dist.get_global_rank(group, 0)
    state = torch.get_rng_state()
    dist.broadcast(state, src=first, group=group)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        dist.broadcast(state, src=first, group=group)
        torch.cuda.set_rng_state(state, device)
