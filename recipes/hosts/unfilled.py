"""Models whose parameters have no memory yet, and where they get their weights from once they are spread.

A parameter is made on torch's meta device. An engine spreads the model over its ranks, and only then gives
memory to what this rank holds: nothing is ever whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_parameter_registration_hook


class WeightSource(ABC):
    """Where the parameters of an unfilled model come from."""

    @abstractmethod
    def give(self, model: nn.Module, device: torch.device) -> None:
        """Gives memory, and weights, to every parameter that has none. All ranks call it together.

        Args:
            model: Spread over the ranks already; parameters that have memory are left as they are.
            device: Where this rank computes.
        """


class LaterWeights(WeightSource):
    """Memory alone: a checkpoint is loaded into it."""

    def give(self, model: nn.Module, device: torch.device) -> None:
        """See `WeightSource.give`."""
        allocate(model, lambda name, parameter: torch.empty_like(parameter, device=device))


class TakenWeights(WeightSource):
    """The parameters of another model of the same shape that is spread alike; it is of no use afterwards."""

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            # A forward pass without backward leaves the outermost weights gathered.
            if isinstance(module, FSDPModule):
                module.reshard()
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(persistent_buffers(model))

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


def unfilled_model(config: Any, *, trust_remote_code: bool = False) -> Any:
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
