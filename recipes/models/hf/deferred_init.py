"""Models whose parameters have no memory yet, and where they get their weights from once they are spread.

A parameter is made on torch's meta device. An engine spreads the model over its ranks, and only then gives
memory to what this rank holds, and has the model's `WeightSource` fill it: nothing is ever whole.
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
    """Where the parameters of an unfilled model come from."""

    @abstractmethod
    def fill(self, held: Mapping[str, Placed]) -> None:
        """Writes weights into what this rank holds, whatever engine's memory that is.

        Args:
            held: By the name that the host gives a tensor, what this rank holds of it; of parameters without
                memory of their own, and of `buffers`.
        """

    @property
    def buffers(self) -> Collection[str]:
        """The buffers that it has values for."""
        return ()

    def wanted(self, model: nn.Module) -> set[str]:
        """What of a model it is to fill: parameters that have no memory, and its own buffers."""
        empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        return empty | {name for name, _ in persistent_buffers(model) if name in self.buffers}

    def give(self, model: nn.Module, device: torch.device) -> None:
        """Gives memory, and weights, to every parameter that has none. All ranks call it together.

        Args:
            model: Spread over the ranks already; parameters that have memory are left as they are.
            device: Where this rank computes.
        """
        wanted = self.wanted(model)
        allocate(model, lambda name, parameter: torch.empty_like(parameter, device=device))
        live = dict(model.named_parameters()) | dict(persistent_buffers(model))
        self.fill({name: place(name, live[name]) for name in wanted})


class CheckpointWeights(WeightSource):
    """Memory alone: a checkpoint is loaded into it."""

    def fill(self, held: Mapping[str, Placed]) -> None:
        """See `WeightSource.fill`."""


class PresentWeights(WeightSource):
    """What is in memory, whole, and for the rest another source."""

    def __init__(self, tensors: Mapping[str, Tensor], rest: WeightSource | None) -> None:
        """Copies nothing yet.

        Args:
            tensors: By name; those on the meta device are the other source's.
            rest: The other source; None where there is nothing on the meta device.
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
            assert self._rest is not None, f"nobody has weights for {sorted(others)}"
            self._rest.fill(others)


class DonatedWeights(WeightSource):
    """The parameters of another model of the same shape that is spread alike; it is of no use afterwards."""

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            # A forward pass without backward leaves the outermost weights gathered.
            if isinstance(module, FSDPModule):
                module.reshard()
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(persistent_buffers(model))

    def fill(self, held: Mapping[str, Placed]) -> None:
        """What is spread alike is handed over, and never copied."""
        raise AssertionError(f"{sorted(held)} are to be taken as they are")

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
    """A tensor of that shape, dtype and device that takes the memory of one element; not to be written to.

    Unlike a tensor on the meta device it can stand where an engine asks for real ones.
    """
    return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))


def has_memory(tensor: Tensor) -> bool:
    """Whether all elements of a tensor have a place of their own; those `without_memory` share one."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def stand_in(model: nn.Module, device: torch.device) -> None:
    """Puts tensors `without_memory` where a model has parameters on the meta device."""
    allocate(model, lambda name, parameter: without_memory(parameter.shape, parameter.dtype, device))


def drop_memory(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Leaves parameters shapes alone; whoever else holds what they were keeps it."""
    for parameter in parameters:
        parameter.data = without_memory(parameter.shape, parameter.dtype, device)


def allocate(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replaces every parameter without memory, tied ones by one and the same.

    Args:
        model: Plain, or under FSDP2.
        make: From a parameter's name and the parameter to what takes its place.
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
        # FSDP2 looks at its parameters anew when something has been done to all of them.
        model._apply(lambda tensor: tensor)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are part of a model's state."""
    state = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While open, parameters of new modules have no memory; buffers do, with their values.

    Not torch's meta device for everything: what a model computes into its buffers, as the frequencies of
    rotary embedding, would be lost.
    """

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def deferred_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A decoder of transformers in fp32 and evaluation mode, its parameters without memory.

    Args:
        config: transformers' config; its dtype is set to fp32.
        trust_remote_code: Whether the model may bring its own code.
    """
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.config.use_cache = False
    return model.eval()
