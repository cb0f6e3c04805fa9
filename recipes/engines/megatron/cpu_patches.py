"""megatron-core on CPUs: what it puts on a GPU without asking, put where the tensors are.

Each patch is a name, the module it changes, why, and what it puts there; none is in place outside of
`on_cpu`. The modules of megatron-core see a ``torch`` whose CUDA is the CPU; nobody else's torch is changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from moe.errors import ConfigError

#: The version that the patches were written against.
VERSION = "0.16.1"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """One thing that megatron-core takes for granted on a GPU.

    Attributes:
        module: Of megatron-core.
        attribute: What is replaced in it; a dot leads into a class.
        reason: What fails without.
        make: The replacement, from what was there.
    """

    module: str
    attribute: str
    reason: str
    make: Callable[[Any], Any]


class _NoEvent:
    """What a stream hands out: nothing to wait for."""

    def synchronize(self) -> None:
        """Everything is done already."""


class _NoStream:
    """On a CPU everything runs in order; all streams are the same."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        """Everything is done already."""

    def record_event(self) -> _NoEvent:
        """An event that has happened."""
        return _NoEvent()


class _CpuAsCuda(ModuleType):
    """``torch.cuda`` for a module that is to compute on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """Where it thinks its GPU is."""
        return _CPU

    def current_stream(self) -> _NoStream:
        """The only one."""
        return _NoStream()

    default_stream = current_stream

    def synchronize(self) -> None:
        """Everything is done already."""

    def stream(self, stream: _NoStream) -> contextlib.AbstractContextManager[None]:
        """Nothing changes."""
        return contextlib.nullcontext()


class _CpuTorch(ModuleType):
    """``torch`` for such a module: what it makes on "cuda" is made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuAsCuda()
        for name in ("tensor", "zeros"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _cpu_torch(_: Any) -> Any:
    return _CpuTorch()


def _splits_as_lists(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    def exchange(group: Any, rows: Any, *splits: Any) -> Any:
        as_lists = (part.tolist() if isinstance(part, torch.Tensor) else part for part in splits)
        return all_to_all(group, rows, *as_lists)

    return exchange


def _plain_random(fork: Any) -> Callable[..., contextlib.AbstractContextManager[None]]:
    return lambda *args, **kwargs: contextlib.nullcontext()


def _no_state(_: Any) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: torch.empty(0)


PATCHES: dict[str, Patch] = {
    "communication": Patch(
        "megatron.core.tensor_parallel.mappings",
        "torch",
        "what is gathered, scattered or exchanged between ranks arrives in memory of the current GPU",
        _cpu_torch,
    ),
    "layers": Patch(
        "megatron.core.tensor_parallel.layers",
        "torch",
        "the backward pass of a layer that is cut over ranks gathers into memory of the current GPU",
        _cpu_torch,
    ),
    "random": Patch(
        "megatron.core.tensor_parallel.random",
        "CudaRNGStatesTracker.fork",
        "layers of cut sequences draw dropout from a state of a GPU",
        _plain_random,
    ),
    "random state": Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        "recomputation keeps the state that a GPU draws from",
        _no_state,
    ),
    "random restored": Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        "recomputation leaves a call behind for when there will be a GPU, in every pass",
        _no_state,
    ),
    "rotary": Patch(
        "megatron.core.models.common.embeddings.rotary_pos_embedding",
        "torch",
        "frequencies that lie on the CPU are moved to the current GPU in the first forward pass",
        _cpu_torch,
    ),
    "dispatcher": Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "torch",
        "the all-to-all dispatcher waits for the current CUDA stream",
        _cpu_torch,
    ),
    "stream": Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        "the first all-to-all dispatcher makes a CUDA stream, and all others keep it",
        lambda _: _NoStream(),
    ),
    "splits": Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "all_to_all",
        "split sizes become numbers on their way from a GPU; on a CPU they stay tensors",
        _splits_as_lists,
    ),
    "schedule": Patch(
        "megatron.core.pipeline_parallel.schedules",
        "torch",
        "the tokens of a step are counted on a GPU",
        _cpu_torch,
    ),
    "stages": Patch(
        "megatron.core.pipeline_parallel.p2p_communication",
        "torch",
        "what another stage sends arrives in memory of the current GPU, which is then waited for",
        _cpu_torch,
    ),
    "tied": Patch(
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule._is_in_embd_group",
        "an embedding that two stages share is copied between their GPUs when it is built",
        lambda _: lambda self: False,
    ),
    "gradients": Patch(
        "megatron.core.distributed.param_and_grad_buffer",
        "torch",
        "gradients are summed in memory of the current GPU",
        _cpu_torch,
    ),
    "optimizer": Patch(
        "megatron.core.optimizer.optimizer",
        "torch",
        "the loss scale of an optimizer lies on a GPU",
        _cpu_torch,
    ),
    "norm": Patch(
        "megatron.core.optimizer.clip_grads",
        "torch",
        "the norm of gradients begins with a flag on a GPU",
        _cpu_torch,
    ),
    "sums": Patch(
        "megatron.core.utils",
        "torch",
        "the norm of gradients ends as a number on a GPU",
        _cpu_torch,
    ),
}


def require_version(found: str) -> None:
    """The patches are of one version of megatron-core.

    Raises:
        ConfigError: It is another.
    """
    if found != VERSION:
        rule = f"on CPUs the Megatron engine knows megatron-core {VERSION}, and {found} is installed"
        remedy = f"Install megatron-core=={VERSION}, or set engine.device=cuda."
        raise ConfigError.one("engine.device", "cpu", rule, remedy)


@contextlib.contextmanager
def on_cpu(names: Sequence[str] = tuple(PATCHES)) -> Iterator[None]:
    """While open, megatron-core computes on CPUs.

    Args:
        names: Of the patches to put in place.

    Raises:
        ConfigError: megatron-core is of another version.
    """
    import megatron.core

    require_version(megatron.core.__version__)
    with contextlib.ExitStack() as undo:
        for name in names:
            patch = PATCHES[name]
            *within, attribute = patch.attribute.split(".")
            place = functools.reduce(getattr, within, importlib.import_module(patch.module))
            before = getattr(place, attribute)
            setattr(place, attribute, patch.make(before))
            undo.callback(setattr, place, attribute, before)
        yield


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While open, tensors on the CPU tell the type names of a GPU's.

    The distributed optimizer sorts parameters by these names when it is built, and refuses a CPU's.
    """
    plain = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = plain  # type: ignore[method-assign]
