"""Optimizers of a model, used as one, and their config.

They work on plain parameters and on FSDP2's DTensors; N ranks do what one rank does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes.engines.optim.clipping import clip_grad_norm
from recipes.engines.optim.config import FrozenConfig, OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig, lr_factor
from recipes.engines.optim.muon import StackedMuon, local_part
from recipes.engines.optim.parameter_groups import fused_rows, group_parameters

__all__ = [
    "OptimizerSet",
    "ScheduleConfig",
    "build_optimizer",
    "clip_grad_norm",
    "group_parameters",
    "lr_factor",
    "materialise_adamw",
]


class GroupRule(NamedTuple):
    """Update rule of a group of parameters."""

    lr_scale: float
    decay: bool
    muon: bool


def _group_rules(config: OptimConfig) -> dict[str, GroupRule]:
    by_muon = config.name == "muon"
    hidden = config.muon.lr_scale if by_muon else 1.0
    return {
        "router": GroupRule(config.router_lr_scale, decay=False, muon=False),
        "experts": GroupRule(config.expert_lr_scale * hidden, decay=True, muon=by_muon),
        "expert_biases": GroupRule(config.expert_lr_scale, decay=False, muon=False),
        "matrices": GroupRule(hidden, decay=True, muon=by_muon),
        "tensors": GroupRule(1.0, decay=True, muon=False),
        "head": GroupRule(1.0, decay=True, muon=False),
        "embeddings": GroupRule(1.0, decay=False, muon=False),
        "vectors": GroupRule(1.0, decay=False, muon=False),
    }


class OptimizerSet:
    """Optimizers of a model, used as one; `build_optimizer` builds them.

    Attributes:
        optimizers: One or two torch optimizers. Every parameter group has ``name`` and ``base_lr``.
        frozen: Groups that the first updates leave alone.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], frozen: FrozenConfig) -> None:
        self.optimizers = tuple(optimizers)
        self.frozen = frozen

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Live groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        """Sets every learning rate to ``factor`` times its full value."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def drop_frozen(self, step: int) -> None:
        """Drops the gradients of frozen groups, so that neither clipping nor updates see them.

        Args:
            step: Updates before this one.
        """
        if step >= self.frozen.steps:
            return
        for group in self.param_groups:
            if group["name"] in self.frozen.groups:
                for param in group["params"]:
                    param.grad = None

    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def materialise_state(self) -> None:
        """Creates the state that the first step would create, so that a checkpoint can be loaded into it."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if isinstance(optimizer, StackedMuon):
                        optimizer.materialise(param)
                    else:
                        materialise_adamw(optimizer, param)

    def state_tensors(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the live state by its name in checkpoints: ``optim.<parameter name>.<state key>``.

        State that does not exist yet is created, so that the names depend on the model alone. The state of a
        DTensor is a DTensor with the same placements; ``step`` is a plain 0-d tensor. To load a checkpoint,
        copy into the tensors.

        Raises:
            ValueError: A parameter of the optimizer is not among ``named_parameters``.
        """
        self.materialise_state()
        owners = {
            id(param): optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        }
        found: dict[str, Tensor] = {}
        for name, param in named_parameters:
            optimizer = owners.pop(id(param), None)
            if optimizer is not None:
                state = optimizer.state[param]
                found |= {f"optim.{name}.{key}": value for key, value in state.items()}
        if owners:
            raise ValueError(
                f"{len(owners)} trained parameters have no name, so their state cannot be saved. "
                "Give the named_parameters() of the model that the optimizer was built for."
            )
        return found


def state_elements(model: nn.Module, config: OptimConfig, experts: set[int]) -> tuple[int, int]:
    """Returns the elements of the optimizer's state outside and inside some parameters.

    Args:
        model: The model; it needs no memory.
        config: Settings of the optimizer.
        experts: Ids of these parameters.
    """
    params, rules, found = dict(model.named_parameters()), _group_rules(config), [0, 0]
    for group, names in group_parameters(model).items():
        moments = 1 if rules[group].muon else 2
        for name in names:
            found[id(params[name]) in experts] += moments * params[name].numel()
    return found[0], found[1]


class LocalAdamW(torch.optim.AdamW):
    """AdamW of torch on each rank's shards, where parameters are DTensors.

    The update is elementwise, so that shards need nothing of one another. Dispatching lists of DTensors costs
    far more on the host than the update itself.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        complex_numbers: bool = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return complex_numbers


def materialise_adamw(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    """Creates the state of AdamW's first step: zero moments, and a step count on the kernel's device.

    Args:
        optimizer: AdamW of torch.
        param: Parameter that it updates; state that exists stays.
    """
    state = optimizer.state[param]
    if state:
        return
    device = param.device if optimizer.defaults["fused"] else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)


def build_optimizer(model: nn.Module, config: OptimConfig) -> OptimizerSet:
    """Builds the optimizers of a model whose parameters are sharded and on their device already.

    Matrices, experts and head decay. Norms and biases do not, as is usual; nor do routers, whose logits it
    would pull towards uniform routing; nor input embeddings, whose rare rows get decay but hardly any
    gradient (as in OLMo 2, arXiv:2501.00656).

    AdamW runs fused on CPU and CUDA, the fastest of torch's three variants, and on the shards of DTensors.

    Args:
        model: The unwrapped model (FSDP2 does not wrap); see `group_parameters` and `fused_rows` for the
            attributes of its modules that are read.
        config: Settings of the optimizer.

    Raises:
        ValueError: Nothing is trainable, or a parameter is still on the meta device.
    """
    parameters = dict(model.named_parameters())
    groups = group_parameters(model)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient. Unfreeze what is to be trained.")
    deferred = [name for names in groups.values() for name in names if parameters[name].is_meta]
    if deferred:
        raise ValueError(
            f"{deferred[0]} is on the meta device. Fill the model before building its optimizer."
        )
    blocks = fused_rows(model)
    rules = _group_rules(config)
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for group_name, names in groups.items():
        members: list[Tensor] = [parameters[name] for name in names]
        if rules[group_name].muon:
            muon += _muon_groups(group_name, rules[group_name], members, blocks, config)
        else:
            adamw.append(_torch_group(group_name, rules[group_name], members, config))
    return OptimizerSet([*_build_adamw(adamw, config), *_build_muon(muon, config)], config.frozen)


def _torch_group(name: str, rule: GroupRule, members: list[Tensor], config: OptimConfig) -> dict[str, Any]:
    lr = config.lr * rule.lr_scale
    decay = config.weight_decay if rule.decay else 0.0
    return {"params": members, "name": name, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _muon_groups(
    name: str, rule: GroupRule, members: list[Tensor], blocks: dict[int, int], config: OptimConfig
) -> list[dict[str, Any]]:
    split: dict[int, list[Tensor]] = defaultdict(list)
    for param in members:
        split[blocks.get(id(param), 1)].append(param)
    return [{**_torch_group(name, rule, part, config), "blocks": count} for count, part in split.items()]


def _build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> list[torch.optim.Optimizer]:
    if not groups:
        return []
    members = [param for group in groups for param in group["params"]]
    fused = {param.device.type for param in members} <= {"cpu", "cuda"}
    # DeepSpeed asks for torch's own class.
    kind = LocalAdamW if any(isinstance(param, DTensor) for param in members) else torch.optim.AdamW
    return [kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


def _build_muon(groups: list[dict[str, Any]], config: OptimConfig) -> list[torch.optim.Optimizer]:
    if not groups:
        return []
    muon = config.muon
    return [
        StackedMuon(
            groups,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjustment=muon.adjustment,
        )
    ]
