"""Deferred initialisation: parameters without memory, and the sources that fill them once they are sharded.

A parameter is made on torch's meta device. The engine shards the model, allocates only the local shards, and
has the model's `WeightSource` fill them, so that no rank ever holds a whole model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_parameter_registration_hook

from recipes.checkpoint.shard_layout import Box, Placed, place


class WeightSource(ABC):
    """Source of the weights of a deferred model."""

    @abstractmethod
    def fill(self, held: Mapping[str, Placed]) -> None:
        """Writes weights into the local shards.

        Args:
            held: Name in the model -> local pieces, for deferred parameters and for `buffers`.
        """

    @property
    def buffers(self) -> Collection[str]:
        """Names of the buffers that it has values for."""
        return ()

    def wanted(self, model: nn.Module) -> set[str]:
        """Returns the names to fill in a model: deferred parameters, and this source's `buffers`."""
        empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        return empty | {name for name, _ in persistent_buffers(model) if name in self.buffers}

    def give(self, model: nn.Module, device: torch.device) -> None:
        """Allocates and fills all deferred parameters. Collective.

        Args:
            model: The sharded model; parameters that have memory are left unchanged.
            device: The device of this rank.
        """
        wanted = self.wanted(model)
        allocate(model, lambda name, parameter: torch.empty_like(parameter, device=device))
        live = dict(model.named_parameters()) | dict(persistent_buffers(model))
        self.fill({name: place(name, live[name]) for name in wanted})


class CheckpointWeights(WeightSource):
    """Source that only leaves the allocated memory, into which a checkpoint is loaded."""

    def fill(self, held: Mapping[str, Placed]) -> None:
        """See `WeightSource.fill`."""


class PresentWeights(WeightSource):
    """Source of whole tensors in memory, with another source for the others."""

    def __init__(self, tensors: Mapping[str, Tensor], rest: WeightSource | None) -> None:
        """Copies nothing yet.

        Args:
            tensors: Tensors by name; those on the meta device are left to the other source.
            rest: The other source; None if no tensor is on the meta device.
        """
        self._tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        self._rest = rest

    @property
    def buffers(self) -> Collection[str]:
        """See `WeightSource.buffers`."""
        return () if self._rest is None else self._rest.buffers

    @torch.no_grad()
    def fill(self, held: Mapping[str, Placed]) -> None:
        """See `WeightSource.fill`."""
        for name in held.keys() & self._tensors.keys():
            for piece in held[name].pieces:
                whole = Box((0,) * len(held[name].shape), held[name].shape)
                piece.tensor.copy_(self._tensors[name][piece.box.within(whole)])
        others = {name: placed for name, placed in held.items() if name not in self._tensors}
        if others:
            assert self._rest is not None, f"no source has weights for {sorted(others)}"
            self._rest.fill(others)


@torch.no_grad()
def refill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replaces the weights and buffers of a model that has memory; each rank keeps its part. Collective.

    Args:
        model: A plain model, or one that is sharded over the ranks.
        tensors: Names and whole tensors, as an engine gathers them; all ranks exhaust it together.
    """
    reshard(model)
    live = dict(model.named_parameters()) | dict(persistent_buffers(model))
    missing = set(live)
    for name, tensor in tensors:
        placed = place(name, live[name])
        for piece in placed.pieces:
            piece.tensor.copy_(tensor[piece.box.within(Box((0,) * len(placed.shape), placed.shape))])
        missing.remove(name)
    assert not missing, f"no tensors came for {sorted(missing)}"


def reshard(model: nn.Module) -> None:
    """Returns the weights of a model under FSDP2 to their shards.

    A forward pass without backward leaves the outermost ones unsharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class DonatedWeights(WeightSource):
    """Source that takes the parameters of another model, sharded alike, which is unusable afterwards."""

    def __init__(self, model: nn.Module) -> None:
        reshard(model)
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(persistent_buffers(model))

    def fill(self, held: Mapping[str, Placed]) -> None:
        """Always fails: parameters are taken over by `give`, never copied."""
        raise AssertionError(f"{sorted(held)} are taken over, never filled")

    @torch.no_grad()
    def give(self, model: nn.Module, device: torch.device) -> None:
        """See `WeightSource.give`."""
        allocate(model, self._take)
        self._parameters.clear()
        for name, buffer in persistent_buffers(model):
            buffer.copy_(self._buffers[name])

    def _take(self, name: str, parameter: Tensor) -> Tensor:
        taken = self._parameters.pop(name).detach()
        mine, theirs = ((each.shape, getattr(each, "placements", None)) for each in (parameter, taken))
        assert mine == theirs, (name, mine, theirs)
        return taken


def without_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor that takes the memory of one element and must not be written to.

    Unlike a tensor on the meta device, it is accepted where an engine requires a real one.
    """
    return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))


def has_memory(tensor: Tensor) -> bool:
    """Returns True if all elements of a tensor have their own memory; those `without_memory` share one."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def stand_in(model: nn.Module, device: torch.device) -> None:
    """Replaces a model's parameters on the meta device by tensors `without_memory`."""
    allocate(model, lambda name, parameter: without_memory(parameter.shape, parameter.dtype, device))


def drop_memory(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Frees the memory of parameters, unless others hold it, and keeps their shapes."""
    for parameter in parameters:
        parameter.data = without_memory(parameter.shape, parameter.dtype, device)


def allocate(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replaces all parameters on the meta device, tied ones by the same tensor.

    Args:
        model: A plain model, or one under FSDP2.
        make: Maps a parameter's name and the parameter to the new tensor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                tensor = make(names[id(parameter)], parameter)
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]
    if isinstance(model, FSDPModule):
        # FSDP2 re-registers its parameters after a change of all of them.
        model._apply(lambda tensor: tensor)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers that are part of a model's state dict."""
    state = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Keeps, while open, the parameters of new modules on the meta device; buffers get their values.

    Under torch's meta device, computed buffers such as rotary frequencies would be lost. Nothing is drawn for
    the parameters: torch draws on the meta device in Python, which took most of the time.
    """
    from transformers.initialization import guard_torch_init_functions

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return parameter

    handle = register_module_parameter_registration_hook(drop)
    try:
        with guard_torch_init_functions():
            yield
    finally:
        handle.remove()


def deferred_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Builds a decoder of transformers in fp32 and evaluation mode, with deferred parameters.

    Args:
        config: transformers' config; its dtype is set to fp32.
        trust_remote_code: Whether the model may run its own code.
    """
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.config.use_cache = False
    return model.eval()
