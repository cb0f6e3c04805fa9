"""DeepSpeed's engine for MoE models. Importing this module imports DeepSpeed."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.utils import set_z3_leaf_modules_by_name

from recipes.engines.deepspeed.zero_experts import EXPERT_GROUPS, DeepSpeedEP
from recipes.engines.optim.optimizer import OptimizerSet
from recipes.models.hf.deferred_init import has_memory, without_memory
from recipes.models.hf.hf_model import HFModel


class MoEEngine(DeepSpeedEngine):
    """DeepSpeed's engine, which finds MoE layers by marks on their parameters and not by their class."""

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(is_moe_param(param) for param in model.parameters())

    def _broadcast_model(self) -> None:
        """Does nothing: the weights are filled later."""

    def _validate_zero3_moe_compatibility(self) -> None:
        """Accepts ZeRO-3: our experts are placed like those of DeepSpeed's automatic expert parallelism."""


def join() -> None:
    """Makes DeepSpeed use the process group that is open. Collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own reduction for CPUs would be compiled on each machine at the first start, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls functions of torch by deprecated names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Closes the default process group, and makes DeepSpeed forget all groups."""
    if deepspeed.comm.comm.cdb is None:
        # DeepSpeed has not joined: something failed before.
        torch.distributed.destroy_process_group()
        return
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def wrap(model: HFModel, optimizer: OptimizerSet, ds_config: dict[str, Any], ep: DeepSpeedEP) -> MoEEngine:
    """Wraps a model after expert parallelism, and allocates this rank's part of it, unfilled.

    Args:
        model: Model whose parameters have no memory yet.
        optimizer: A single torch optimizer of these parameters; ZeRO gives it the partitions to update.
        ds_config: From `recipes.engines.deepspeed.config.make_ds_config`.
        ep: From `recipes.engines.deepspeed.zero_experts.apply_ep`.
    """
    (inner,) = optimizer.optimizers
    names = [group["name"] for group in inner.param_groups]
    if ep.ranks > 1:
        for group in inner.param_groups:
            if group["name"] in EXPERT_GROUPS:
                # DeepSpeed finds the ranks of a group of experts by its name.
                group |= {"moe": True, "name": ep.name}
    _make_leaves(model)
    with _without_copies():
        wrapped = MoEEngine(
            args=None,
            model=model.module,
            optimizer=inner,
            config=ds_config,
            config_class=DeepSpeedConfig(ds_config),
        )
    for group, name in zip(inner.param_groups, names, strict=True):
        group["name"] = name
    _give_memory(wrapped.optimizer, model.module)
    _share_weights(wrapped.optimizer)
    return wrapped


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """While open, lets DeepSpeed lay out parameters without memory, and neither copy nor send them."""
    replaced = [
        (DeepSpeedZeroOptimizer, "flatten_dense_tensors_aligned", _flat_without_memory),
        (DeepSpeedZeroOptimizer, "initialize_optimizer_states", _nothing),
        (deepspeed.zero.Init, "_zero_init_param", _partition_only),
        (deepspeed.zero.Init, "_all_gather", _gather_nothing),
        (DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", _create_shared_partitions),
        (DeepSpeedZeroOptimizer_Stage3, "initialize_optimizer_states", _nothing),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, instead in replaced:
            setattr(owner, name, instead)
        yield
    finally:
        for (owner, name, _), was in zip(replaced, before, strict=True):
            setattr(owner, name, was)


def _flat_without_memory(
    zero: Any,
    tensors: Sequence[Any],
    alignment: int,
    use_cpu_data: bool = False,
    param_padding: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns the flat tensor of a group for ZeRO-1 and ZeRO-2, without memory and without copying."""
    sizes = [(tensor.cpu_data if use_cpu_data else tensor).numel() for tensor in tensors]
    numel = sum(sizes) + sum(param_padding or ())
    return without_memory([numel + -numel % alignment], tensors[0].dtype, zero.device)


def _partition_only(init: Any, param: Any) -> None:
    """Partitions a parameter as ZeRO-3 does, without broadcasting it first."""
    init._convert_to_deepspeed_param(param)
    param.partition()


def _gather_nothing(init: Any, params: Sequence[Any], async_op: bool = False, hierarchy: Any = None) -> None:
    """Gives parameters their full shape without memory, which is enough for ZeRO-3 to register its hooks."""
    for param in params:
        param.data = without_memory(param.ds_shape, param.dtype, init.local_device)
        param.ds_status = ZeroParamStatus.AVAILABLE


def _create_shared_partitions(
    zero: Any, create: Any = DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions
) -> None:
    """Makes ZeRO-3 update fp32 weights in place; it would mistake the device's name for another device."""
    zero.device = torch.device(zero.device)
    create(zero)


def _nothing(zero: Any) -> None:
    """Skips the initial step with zero gradients, by which other optimizers create their state."""


def _give_memory(zero: Any, model: torch.nn.Module) -> None:
    """Allocates what DeepSpeed has laid out without memory."""
    flats = getattr(zero, "bit16_groups_flat", ())
    for i in range(len(flats)):
        # ZeRO-1 and ZeRO-2 have copied empty tensors.
        zero.single_partition_of_fp32_groups[i].untyped_storage().resize_(0)
    for i, flat in enumerate(flats):
        whole = torch.zeros(flat.shape, dtype=flat.dtype, device=flat.device)
        zero.bit16_groups_flat[i] = whole
        zero.parallel_partitioned_bit16_groups[i] = zero.get_data_parallel_partitions(whole, i)
        zero._update_model_bit16_weights(i)
    for parameter in model.parameters():
        if not has_memory(parameter):
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _make_leaves(model: HFModel) -> None:
    """Makes ZeRO-3 gather and reduce each routed layer as a whole, no matter which experts run."""
    routed = {id(layer) for layer in model.routed_layers()}
    named = [(name, module) for name, module in model.module.named_modules() if id(module) in routed]
    set_z3_leaf_modules_by_name(model.module, [name for name, _ in named])
    for _, module in named:
        module.register_forward_pre_hook(_by_position, with_kwargs=True)


def _by_position(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Passes the first argument by position: hooks on the gradients of inputs do not see keywords."""
    if args:
        return args, kwargs
    first = next(iter(inspect.signature(module.forward).parameters))
    return (kwargs[first],), {key: value for key, value in kwargs.items() if key != first}


def _share_weights(zero: Any) -> None:
    """Makes ZeRO update the model's own weights, which are fp32 already, and not its fp32 copy of them."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            rank = torch.distributed.get_rank(zero.real_dp_process_group[i])
            master.data = zero.parallel_partitioned_bit16_groups[i][rank].data
        # Otherwise each parameter would keep the copy alive.
        zero._link_all_hp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        for master, part in zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        ):
            master.data = part.data


def discard_gradients(wrapped: MoEEngine, stage: int) -> None:
    """Discards the gradients of a step that is skipped."""
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


def release(wrapped: MoEEngine) -> None:
    """Frees the memory of a model that is no longer used.

    Hooks on gradients keep a model alive. Without them Python frees it, except under ZeRO-3, whose parameters
    form cycles that Python does not see: their memory is freed here.
    """
    wrapped.destroy()
    zero: Any = wrapped.optimizer
    if not hasattr(zero, "lp_param_buffer"):
        return
    moments = [value for state in zero.optimizer.state.values() for value in state.values()]
    for tensor in (zero.lp_param_buffer, zero.grad_partitions_flat_buffer, *moments):
        if (storage := tensor.untyped_storage()).resizable():
            storage.resize_(0)


def let_go(wrapped: MoEEngine) -> None:
    """Waits for what ZeRO-3 gathers ahead of a pass that does not come, and splits it again. Collective.

    A parameter in flight cannot be gathered on its own.
    """
    wrapped.optimizer.parameter_offload.partition_all_parameters()


def gathered(param: Any) -> Any:
    """Returns a context in which a parameter that ZeRO-3 has split is whole. Collective."""
    return deepspeed.zero.GatheredParameters([param])
