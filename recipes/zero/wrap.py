"""DeepSpeed around a host. Importing this module imports DeepSpeed."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import set_z3_leaf_modules_by_name

from recipes.hosts.huggingface import HuggingFaceHost
from recipes.optim import OptimizerSet
from recipes.zero.experts import EXPERT_GROUPS, Spread


class MixtureEngine(DeepSpeedEngine):
    """DeepSpeed's engine, for expert layers that are not of its own classes.

    It knows mixtures by its own classes alone; here they are known by how their parameters are marked.
    """

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(is_moe_param(param) for param in model.parameters())

    def _validate_zero3_moe_compatibility(self) -> None:
        """Our experts are placed as DeepSpeed's automatic expert parallelism places its own."""


def join() -> None:
    """Makes DeepSpeed use the process group that is open. Collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own reduction for CPUs would be compiled by each machine at its first start, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls functions of torch by names that torch is about to drop, every time.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Closes the default process group, and lets DeepSpeed forget all of them."""
    if deepspeed.comm.comm.cdb is None:
        # It has not joined: something failed before.
        torch.distributed.destroy_process_group()
        return
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def wrap(
    host: HuggingFaceHost, optimizer: OptimizerSet, told: dict[str, Any], spread: Spread
) -> MixtureEngine:
    """Wraps a host whose experts are spread already.

    Args:
        host: It is changed.
        optimizer: Of its parameters; one torch optimizer, which ZeRO gives its partitions to.
        told: From `recipes.zero.settings.settings`.
        spread: From `recipes.zero.experts.spread_experts`.
    """
    (inner,) = optimizer.optimizers
    names = [group["name"] for group in inner.param_groups]
    if spread.ranks > 1:
        for group in inner.param_groups:
            if group["name"] in EXPERT_GROUPS:
                # While DeepSpeed looks, a group of experts is called like the ranks that share them.
                group |= {"moe": True, "name": spread.name}
    _make_leaves(host)
    wrapped = MixtureEngine(
        args=None, model=host.model, optimizer=inner, config=told, config_class=DeepSpeedConfig(told)
    )
    for group, name in zip(inner.param_groups, names, strict=True):
        group["name"] = name
    _share_weights(wrapped.optimizer)
    return wrapped


def _make_leaves(host: HuggingFaceHost) -> None:
    """Has ZeRO-3 gather and reduce each layer with a router whole, whichever experts run."""
    routed = {id(layer) for layer in host.routed_layers()}
    named = [(name, module) for name, module in host.model.named_modules() if id(module) in routed]
    set_z3_leaf_modules_by_name(host.model, [name for name, _ in named])
    for _, module in named:
        module.register_forward_pre_hook(_by_position, with_kwargs=True)


def _by_position(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention is called by keywords, which hooks on gradients of a module's input do not see."""
    if args:
        return args, kwargs
    first = next(iter(inspect.signature(module.forward).parameters))
    return (kwargs[first],), {key: value for key, value in kwargs.items() if key != first}


def _share_weights(zero: Any) -> None:
    """Updates the model's own weights, of which ZeRO made a copy in fp32, as they are already."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            rank = torch.distributed.get_rank(zero.real_dp_process_group[i])
            master.data = zero.parallel_partitioned_bit16_groups[i][rank].data
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        for master, part in zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        ):
            master.data = part.data


def discard_gradients(wrapped: MixtureEngine, stage: int) -> None:
    """Forgets the gradients of a step that is not taken."""
    zero: Any = wrapped.optimizer
    if stage == 0:
        wrapped.zero_grad()
        return
    zero.zero_grad(set_to_none=True)
    if stage == 3:
        zero._pre_step()
        zero.averaged_gradients = {}
        return
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    for i in zero.averaged_gradients:
        zero.averaged_gradients[i] = None
        zero.all_grad_tensors[i] = None


def release(wrapped: MixtureEngine) -> None:
    """Gives back what a model that nobody uses any more holds.

    Hooks on gradients keep a model for ever. Without them Python frees it, but for ZeRO-3, whose parameters
    hold each other in ways that it does not see through: of those the memory is freed.
    """
    wrapped.destroy()
    zero: Any = wrapped.optimizer
    if not hasattr(zero, "lp_param_buffer"):
        return
    moments = [value for state in zero.optimizer.state.values() for value in state.values()]
    for tensor in (zero.lp_param_buffer, zero.grad_partitions_flat_buffer, *moments):
        tensor.untyped_storage().resize_(0)


def gathered(param: Any) -> Any:
    """A context in which a parameter that ZeRO-3 has cut is whole. Collective."""
    return deepspeed.zero.GatheredParameters([param])
