"""Megatron's optimizers with our parameter groups, and their state under our names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.checkpoint.shard_layout import LocalBlocks, LocalShard, flat_boxes
from recipes.engines.megatron.cpu_patches import cuda_type_names
from recipes.engines.megatron.hf_weights import Blocks, Held, Part
from recipes.engines.megatron.settings import Settings
from recipes.engines.optim.optimizer import OptimConfig, build_optimizer
from recipes.models.hf.hf_model import HFModel

_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rule:
    """How a parameter is updated.

    Attributes:
        group: What it is for; see `recipes.engines.optim.parameter_groups`.
        lr: Learning rate at the top of the schedule.
        weight_decay: Decoupled.
    """

    group: str
    lr: float
    weight_decay: float


def rules_of(model: HFModel, optim: OptimConfig) -> dict[str, Rule]:
    """The rule of every parameter that is trained, by the host's name; before the host is emptied.

    They are those of the native engine, read off its optimizer.
    """
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    return {
        names[id(parameter)]: Rule(group["name"], group["base_lr"], group["weight_decay"])
        for group in build_optimizer(model.module, optim).param_groups
        for parameter in group["params"]
    }


def rule_of(held: Held, rules: Mapping[str, Rule]) -> Rule:
    """The one rule of all that a parameter is made of."""
    found = {rules[part.name] for part in held.parts}
    assert len(found) == 1, f"{held.parts} are updated in different ways"
    return found.pop()


def build_adamw(
    chunk: Any,
    held: Sequence[Held],
    rules: Mapping[str, Rule],
    optim: OptimConfig,
    settings: Settings,
) -> Any:
    """Megatron's optimizer of a model that is wrapped in its data parallelism.

    Args:
        chunk: The wrapped model.
        held: What its parameters are made of.
        rules: From `rules_of`.
        optim: Of AdamW.
        settings: Of the engine.
    """
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    members: dict[tuple[float, float], set[int]] = {}
    for each in held:
        if each.tensor.requires_grad:
            rule = rule_of(each, rules)
            members.setdefault((rule.lr, rule.weight_decay), set()).add(id(each.tensor))
    overrides = {
        ParamKey(predicate=ParamPredicate(str(rates), lambda p, own=own: id(p) in own)): ParamGroupOverride(
            max_lr=rates[0], wd_mult=rates[1]
        )
        for rates, own in members.items()
    }
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_norm or 0.0,
        use_distributed_optimizer=settings.distributed,
        bf16=settings.dtype == torch.bfloat16,
        params_dtype=torch.float32,
    )
    named_as = cuda_type_names() if settings.device.type == "cpu" else contextlib.nullcontext()
    with _torch_adamw(), named_as:
        optimizer = get_megatron_optimizer(config, [chunk], config_overrides=overrides)
    for group in optimizer.param_groups:
        # The decay itself: a factor could not tell what decays from what does not where the decay is 0.
        group["weight_decay"] = group["wd_mult"]
    return optimizer


@contextlib.contextmanager
def _torch_adamw() -> Iterator[None]:
    """torch's AdamW whatever else is installed: the names of its state are those of our checkpoints."""
    import megatron.core.optimizer as module

    before = module.USING_PYTORCH_OPTIMIZER
    module.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        module.USING_PYTORCH_OPTIMIZER = before


@dataclass(frozen=True)
class _Kept:
    """What an optimizer keeps of a parameter on this rank: elements ``low ... high - 1`` of it, flattened.

    Attributes:
        main: What it updates, in fp32.
        optimizer: torch's, that updates it.
        low: First element.
        high: Behind the last.
        sharded: Whether other ranks keep the others.
    """

    main: Tensor
    optimizer: torch.optim.Optimizer
    low: int
    high: int
    sharded: bool


def state_tensors(optimizer: Any, held: Sequence[Held]) -> dict[str, LocalBlocks]:
    """The live state, as a checkpoint names it: ``optim.<parameter name>.<state key>``.

    State that does not exist yet is created. A tensor of the host has one ``step``, whatever it is cut into.
    """
    blocks: dict[str, list[LocalShard]] = {}
    for each in held:
        kept = _kept(optimizer, each.tensor) if each.tensor.requires_grad else None
        state = {} if kept is None else _materialised(kept.optimizer, kept.main)
        for part in each.parts if kept is not None else ():
            assert kept is not None
            found = {key: list(_blocks(kept, state[key], part)) for key in _STATES}
            if not any(found.values()):
                continue
            found["step"] = [LocalShard(state["step"], (), ())]
            for key, pieces in found.items():
                blocks.setdefault(f"optim.{part.name}.{key}", []).extend(pieces)
    return {name: LocalBlocks(pieces[0].global_shape, tuple(pieces)) for name, pieces in blocks.items()}


def master_blocks(optimizer: Any, held: Sequence[Held]) -> dict[str, Blocks]:
    """The memory of the fp32 weights that the optimizer keeps of parameters of a lower precision."""
    found: dict[str, Blocks] = {}
    for each in held:
        kept = _kept(optimizer, each.tensor)
        like = torch.empty(0, dtype=torch.float32, device=each.tensor.device)
        for part in each.parts:
            before = found[part.name].shards if part.name in found else ()
            own = () if kept is None else tuple(_blocks(kept, kept.main.detach(), part))
            sharded = kept is None or kept.sharded
            found[part.name] = Blocks(part.shape, like, each.over, sharded, (*before, *own))
    return found


@torch.no_grad()
def copy_masters(optimizer: Any, chunk: Any) -> None:
    """Brings the parameters to the fp32 weights that the optimizer keeps. Collective."""
    for each in optimizer.chained_optimizers:
        each._copy_main_params_to_model_params()
    if chunk.ddp_config.use_distributed_optimizer:
        chunk.start_param_sync(force_sync=True)


def _blocks(kept: _Kept, values: Tensor, part: Part) -> Iterator[LocalShard]:
    """What is kept of a part, out of values that are kept of its parameter."""
    numel = math.prod(part.size)
    begin = part.start * (numel // part.rows)
    low, high = max(kept.low, begin), min(kept.high, begin + numel)
    flat, done = values.flatten(), low - kept.low
    for box in flat_boxes(part.size, low - begin, high - low) if low < high else ():
        offset = tuple(a + b for a, b in zip(part.offset, box.offset, strict=True))
        yield LocalShard(flat[done : done + box.numel].view(box.size), part.shape, offset)
        done += box.numel


def _kept(optimizer: Any, parameter: Tensor) -> _Kept | None:
    """What this rank keeps of a parameter's state; None for nothing."""
    for each in optimizer.chained_optimizers:
        main = _main(each, parameter)
        if main is not None:
            if not hasattr(each, "model_param_group_index_map"):
                return _Kept(main, each.optimizer, 0, parameter.numel(), sharded=False)
            part = each._get_model_param_range_map(parameter)["param"]
            return _Kept(main, each.optimizer, part.start, part.end, sharded=True)
    return None


def _main(optimizer: Any, parameter: Tensor) -> Tensor | None:
    """What an optimizer updates for a parameter: itself, or the part of it that is this rank's."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if isinstance(optimizer, DistributedOptimizer):
        groups = (
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        )
        for models, mains in groups:
            for params, shards in zip(models, mains, strict=True):
                pairs = zip(params, shards, strict=True)
                found = [shard for own, shard in pairs if own is parameter]
                if found:
                    return found[0]
        return None
    master = getattr(parameter, "main_param", parameter)
    own = (p for group in optimizer.param_groups for p in group["params"])
    return next((p for p in own if p is master), None)


def drop_gradients(optimizer: Any, parameters: Iterable[Tensor]) -> None:
    """Forgets their gradients, once these are prepared: neither norms nor updates see them."""
    for parameter in parameters:
        for each in optimizer.chained_optimizers:
            main = _main(each, parameter)
            if main is not None:
                main.grad = None


def _materialised(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter; what AdamW's first step would create where there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in _STATES:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
