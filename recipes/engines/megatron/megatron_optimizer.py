"""Megatron's optimizers with our parameter groups, and their state under the names of our checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.checkpoint.shard_layout import LocalBlocks, LocalShard, flat_boxes
from recipes.engines.megatron.build_settings import BuildSettings
from recipes.engines.megatron.cpu_patches import cuda_type_names
from recipes.engines.megatron.hf_weights import LocalParameter, LocalTensor, RowBlock
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import build_optimizer
from recipes.models.hf.hf_model import HFModel

_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rule:
    """Update rule of a parameter.

    Attributes:
        group: Name of its group, see `recipes.engines.optim.parameter_groups`.
        lr: Learning rate at the top of the schedule.
        weight_decay: Decoupled weight decay.
    """

    group: str
    lr: float
    weight_decay: float


def rules_of(model: HFModel, optim: OptimConfig) -> dict[str, Rule]:
    """Returns the update rule of every trained parameter by name, as the native engine's optimizer has it.

    Call it before the weights of the model are freed.
    """
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    return {
        names[id(parameter)]: Rule(group["name"], group["base_lr"], group["weight_decay"])
        for group in build_optimizer(model.module, optim).param_groups
        for parameter in group["params"]
    }


def rule_of(local: LocalParameter, rules: Mapping[str, Rule]) -> Rule:
    """Returns the update rule that all blocks of a parameter share."""
    found = {rules[part.name] for part in local.blocks}
    assert len(found) == 1, f"{local.blocks} are updated in different ways"
    return found.pop()


def build_adamw(
    chunk: Any,
    local: Sequence[LocalParameter],
    rules: Mapping[str, Rule],
    optim: OptimConfig,
    settings: BuildSettings,
) -> Any:
    """Builds Megatron's optimizer of a model that is wrapped in its data parallelism.

    Args:
        chunk: The wrapped model.
        local: The parameters of this rank.
        rules: From `rules_of`.
        optim: Settings of AdamW.
        settings: Settings of the model.
    """
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    members: dict[tuple[float, float], set[int]] = {}
    for each in local:
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
        # ``wd_mult`` is the decay itself and no factor of it: groups differ even if the decay is 0.
        group["weight_decay"] = group["wd_mult"]
    return optimizer


@contextlib.contextmanager
def _torch_adamw() -> Iterator[None]:
    """While open, makes Megatron use torch's AdamW, whose state has the names of our checkpoints."""
    import megatron.core.optimizer as module

    before = module.USING_PYTORCH_OPTIMIZER
    module.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        module.USING_PYTORCH_OPTIMIZER = before


@dataclass(frozen=True)
class _OptimizerShard:
    """Elements ``low ... high - 1`` of a flattened parameter, which an optimizer updates on this rank.

    Attributes:
        main: The fp32 tensor that is updated.
        optimizer: torch's optimizer that updates it.
        low: Index of the first element.
        high: Index behind the last element.
        sharded: Whether other ranks update the other elements.
    """

    main: Tensor
    optimizer: torch.optim.Optimizer
    low: int
    high: int
    sharded: bool


def state_tensors(optimizer: Any, local: Sequence[LocalParameter]) -> dict[str, LocalBlocks]:
    """Returns the live state by its name in checkpoints: ``optim.<parameter name>.<state key>``.

    State that does not exist yet is created. A tensor has one ``step``, however it is sharded.
    """
    shards: dict[str, list[LocalShard]] = {}
    for each in local:
        own = _shard_of(optimizer, each.tensor) if each.tensor.requires_grad else None
        if own is None:
            continue
        state = _materialised(own.optimizer, own.main)
        for block in each.blocks:
            found = {key: list(_shards(own, state[key], block)) for key in _STATES}
            if not any(found.values()):
                continue
            found["step"] = [LocalShard(state["step"], (), ())]
            for key, values in found.items():
                shards.setdefault(f"optim.{block.name}.{key}", []).extend(values)
    return {name: LocalBlocks(values[0].global_shape, tuple(values)) for name, values in shards.items()}


def master_tensors(optimizer: Any, local: Sequence[LocalParameter]) -> dict[str, LocalTensor]:
    """Returns the fp32 master weights that the optimizer keeps of parameters of lower precision."""
    found: dict[str, LocalTensor] = {}
    for each in local:
        own = _shard_of(optimizer, each.tensor)
        like = torch.empty(0, dtype=torch.float32, device=each.tensor.device)
        sharded = own is None or own.sharded
        for block in each.blocks:
            before = found[block.name].shards if block.name in found else ()
            shards = () if own is None else tuple(_shards(own, own.main.detach(), block))
            found[block.name] = LocalTensor(block.shape, like, each.sharded_over, sharded, (*before, *shards))
    return found


@torch.no_grad()
def copy_masters(optimizer: Any, chunk: Any) -> None:
    """Copies the optimizer's fp32 master weights into the parameters. Collective."""
    for each in optimizer.chained_optimizers:
        each._copy_main_params_to_model_params()
    if chunk.ddp_config.use_distributed_optimizer:
        chunk.start_param_sync(force_sync=True)


def _shards(own: _OptimizerShard, values: Tensor, block: RowBlock) -> Iterator[LocalShard]:
    """Yields the shards of a block, out of the values of an optimizer's shard of its parameter."""
    numel = math.prod(block.size)
    begin = block.start * (numel // block.rows)
    low, high = max(own.low, begin), min(own.high, begin + numel)
    flat, done = values.flatten(), low - own.low
    for box in flat_boxes(block.size, low - begin, high - low) if low < high else ():
        offset = tuple(a + b for a, b in zip(block.offset, box.offset, strict=True))
        yield LocalShard(flat[done : done + box.numel].view(box.size), block.shape, offset)
        done += box.numel


def _shard_of(optimizer: Any, parameter: Tensor) -> _OptimizerShard | None:
    """Returns the shard of a parameter that this rank updates; None if it updates none of it."""
    for each in optimizer.chained_optimizers:
        main = _main(each, parameter)
        if main is not None:
            if not hasattr(each, "model_param_group_index_map"):
                return _OptimizerShard(main, each.optimizer, 0, parameter.numel(), sharded=False)
            part = each._get_model_param_range_map(parameter)["param"]
            return _OptimizerShard(main, each.optimizer, part.start, part.end, sharded=True)
    return None


def _main(optimizer: Any, parameter: Tensor) -> Tensor | None:
    """Returns the tensor that an optimizer updates for a parameter: itself, its master, or a part of it."""
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
    """Drops gradients after Megatron has prepared them: neither norms nor updates see them."""
    for parameter in parameters:
        for each in optimizer.chained_optimizers:
            main = _main(each, parameter)
            if main is not None:
                main.grad = None


def _materialised(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Returns the state of a parameter, and creates what AdamW's first step would create."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in _STATES:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
