"""Optimizers of a model, used as one, and their config.

They work on plain parameters and on FSDP2's DTensors; N ranks do what one rank does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.errors import require
from moe.types import Config, unless
from recipes.engines.optim.clipping import clip_grad_norm
from recipes.engines.optim.lr_schedule import ScheduleConfig, lr_factor
from recipes.engines.optim.muon import Adjustment, StackedMuon, local_part
from recipes.engines.optim.parameter_groups import GROUPS, fused_rows, group_parameters

__all__ = [
    "MuonConfig",
    "OptimConfig",
    "OptimizerSet",
    "ScheduleConfig",
    "build_optimizer",
    "clip_grad_norm",
    "group_parameters",
    "lr_factor",
    "materialise_adamw",
]


@dataclass(frozen=True)
class MuonConfig(Config):
    """Settings of Muon, used when ``optim.name`` is ``muon``; see `recipes.engines.optim.muon.StackedMuon`.

    Attributes:
        lr_scale: Muon's learning rate is ``lr`` times this.
        momentum: Interpolation factor of the momentum buffer.
        nesterov: Look ahead by one interpolation.
        ns_steps: Newton-Schulz iterations.
        adjustment: Dependence of the step size on a matrix's shape. With ``match_rms_adamw`` the ``lr`` and
            ``weight_decay`` of AdamW serve Muon unchanged.
    """

    lr_scale: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjustment: Adjustment = "match_rms_adamw"

    def __post_init__(self) -> None:
        require(
            self,
            (self.lr_scale >= 0, "lr_scale", "must be 0 or more", "Give 1 for the common lr."),
            (0 <= self.momentum < 1, "momentum", "must be in [0, 1)", "0.95 is usual."),
            (1 <= self.ns_steps < 100, "ns_steps", "must be in [1, 99]", "5 is usual."),
            (
                self.adjustment in ("match_rms_adamw", "original"),
                "adjustment",
                "is unknown",
                "Choose match_rms_adamw or original.",
            ),
        )


@dataclass(frozen=True)
class FrozenConfig(Config):
    """First phase of a run, in which some parameters do not train.

    With the experts frozen, a fresh router learns to use experts that were split well, before they change
    (expert-frozen tuning, arXiv 2512.02351). Gradients are computed all the same.

    Attributes:
        steps: Number of updates; 0 for no such phase.
        groups: Frozen groups, of `recipes.engines.optim.parameter_groups.GROUPS`.
    """

    steps: int = 0
    groups: tuple[str, ...] = ("experts", "expert_biases")

    def __post_init__(self) -> None:
        unknown = [group for group in self.groups if group not in GROUPS]
        require(
            self,
            (self.steps >= 0, "steps", "must be at least 0", "Give 0 for no frozen stage."),
            (not unknown, "groups", f"{unknown} are unknown", f"Choose of {', '.join(GROUPS)}."),
            (set(self.groups) != set(GROUPS), "groups", "nothing is left to train", "Leave one out."),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.steps > 0, "steps is 0, and nothing is frozen", "groups")


@dataclass(frozen=True)
class OptimConfig(Config):
    """Settings of the optimizer.

    Attributes:
        name: ``adamw``, or ``muon``: Muon for the hidden matrices and the experts, AdamW for the rest.
        lr: Learning rate at the top of the schedule.
        router_lr_scale: Factor of the routers' learning rate.
        expert_lr_scale: Factor of the routed experts' learning rate.
        weight_decay: Decoupled weight decay; see `build_optimizer` for the parameters that decay.
        betas: Betas of AdamW.
        eps: Epsilon of AdamW.
        clip_norm: Largest norm of the gradients of all parameters together; None does not clip.
        frozen: Groups that the first updates leave alone.
        muon: Settings of Muon.
        schedule: Learning-rate schedule.
        start_from: Folder of a checkpoint of the dense model's own training (``RUN/cpt/checkpoints/step-N``),
            whose optimizer state the expert copies start with; None starts without state. See
            `recipes.upcycling.optim_start`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    router_lr_scale: float = 1.0
    expert_lr_scale: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    start_from: str | None = None

    def __post_init__(self) -> None:
        scales = {"router_lr_scale": self.router_lr_scale, "expert_lr_scale": self.expert_lr_scale}
        betas_hold = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(
            self,
            (self.name in ("adamw", "muon"), "name", "is no optimizer", "Choose adamw or muon."),
            (self.lr >= 0, "lr", "must be 0 or more", "3e-4 is a usual start."),
            *(
                (value >= 0, key, "must be 0 or more", "Give 1 for the common lr.")
                for key, value in scales.items()
            ),
            (self.weight_decay >= 0, "weight_decay", "must be 0 or more", "Give 0 for none."),
            (betas_hold, "betas", "must be two numbers in [0, 1)", "(0.9, 0.95) is usual."),
            (self.eps > 0, "eps", "must be above 0", "1e-8 is usual."),
            (
                self.clip_norm is None or self.clip_norm > 0,
                "clip_norm",
                "must be above 0",
                "Give null to not clip.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.name == "muon", "optim.name is not muon", "muon")


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
