"""Patches that make megatron-core run on CPUs, where it would allocate on a GPU without asking.

They are in place only within `on_cpu`. Modules of megatron-core then see a ``torch`` whose CUDA device is the
CPU; torch itself is not changed.
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

#: The version that the patches were written for.
VERSION = "0.16.1"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """Replacement of one attribute of megatron-core that assumes a GPU.

    Attributes:
        path: Module, below ``megatron.core``.
        attribute: Name of the attribute; a dot leads into a class.
        reason: What fails without the patch.
        make: Makes the replacement from the original.
    """

    path: str
    attribute: str
    reason: str
    make: Callable[[Any], Any]

    @property
    def module(self) -> str:
        """Name of the module."""
        return f"megatron.core.{self.path}"


class _CpuStream:
    """Stream of a CPU, on which everything runs in order; it is its own event."""

    def synchronize(self) -> None:
        """Returns at once."""

    def wait_stream(self, stream: Any) -> None:
        """Returns at once."""

    def record_event(self) -> _CpuStream:
        """Returns an event that has happened."""
        return self


_STREAM = _CpuStream()


class _CpuAsCuda(ModuleType):
    """``torch.cuda`` for modules that must compute on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """Returns the CPU."""
        return _CPU

    def current_stream(self) -> _CpuStream:
        """Returns the only stream."""
        return _STREAM

    default_stream = current_stream

    def synchronize(self) -> None:
        """Returns at once."""

    def stream(self, stream: _CpuStream) -> contextlib.AbstractContextManager[None]:
        """Returns a context that changes nothing."""
        return contextlib.nullcontext()


class _CpuTorch(ModuleType):
    """``torch`` for such modules, which allocates on the CPU when asked for "cuda"."""

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


def _cpu_torch(module: str, reason: str) -> Patch:
    """Returns the patch that gives a module of megatron-core a ``torch`` for CPUs."""
    return Patch(module, "torch", reason, lambda _: _CpuTorch())


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
    "communication": _cpu_torch(
        "tensor_parallel.mappings",
        "tensors that are gathered, scattered or exchanged between ranks arrive on the current GPU",
    ),
    "layers": _cpu_torch(
        "tensor_parallel.layers",
        "the backward pass of a tensor-parallel layer gathers on the current GPU",
    ),
    "random": Patch(
        "tensor_parallel.random",
        "CudaRNGStatesTracker.fork",
        "layers under sequence parallelism draw dropout from a GPU's random state",
        _plain_random,
    ),
    "random state": Patch(
        "tensor_parallel.random",
        "_get_cuda_rng_state",
        "recomputation keeps the random state of a GPU",
        _no_state,
    ),
    "random restored": Patch(
        "tensor_parallel.random",
        "_set_cuda_rng_state",
        "recomputation queues a call for a later GPU in every pass",
        _no_state,
    ),
    "rotary": _cpu_torch(
        "models.common.embeddings.rotary_pos_embedding",
        "frequencies are moved from the CPU to the current GPU in the first forward pass",
    ),
    "dispatcher": _cpu_torch(
        "transformer.moe.token_dispatcher",
        "the all-to-all dispatcher waits for the current CUDA stream",
    ),
    "stream": Patch(
        "transformer.moe.token_dispatcher",
        "MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        "the first all-to-all dispatcher makes a CUDA stream, which all others share",
        lambda _: _STREAM,
    ),
    "splits": Patch(
        "transformer.moe.token_dispatcher",
        "all_to_all",
        "split sizes are converted to numbers when they are copied from a GPU, and on a CPU stay tensors",
        _splits_as_lists,
    ),
    "schedule": _cpu_torch(
        "pipeline_parallel.schedules",
        "the tokens of a step are counted on a GPU",
    ),
    "stages": _cpu_torch(
        "pipeline_parallel.p2p_communication",
        "tensors from another pipeline stage arrive on the current GPU, which is then synchronised",
    ),
    "tied": Patch(
        "models.common.language_module.language_module",
        "LanguageModule._is_in_embd_group",
        "an embedding that two pipeline stages share is copied between their GPUs when it is built",
        lambda _: lambda self: False,
    ),
    "gradients": _cpu_torch(
        "distributed.param_and_grad_buffer",
        "gradients are summed on the current GPU",
    ),
    "optimizer": _cpu_torch(
        "optimizer.optimizer",
        "the loss scale of an optimizer is on a GPU",
    ),
    "norm": _cpu_torch(
        "optimizer.clip_grads",
        "the norm of gradients starts from a flag on a GPU",
    ),
    "sums": _cpu_torch(
        "utils",
        "the norm of gradients ends as a number on a GPU",
    ),
}


def require_version(found: str) -> None:
    """Requires the version of megatron-core that the patches were written for.

    Raises:
        ConfigError: Another version is installed.
    """
    if found != VERSION:
        rule = f"on CPUs the Megatron engine supports megatron-core {VERSION}, and {found} is installed"
        remedy = f"Install megatron-core=={VERSION}, or set engine.device=cuda."
        raise ConfigError.one("engine.device", "cpu", rule, remedy)


@contextlib.contextmanager
def on_cpu(names: Sequence[str] = tuple(PATCHES)) -> Iterator[None]:
    """While open, makes megatron-core compute on CPUs.

    Args:
        names: Names of the patches to apply.

    Raises:
        ConfigError: Another version of megatron-core is installed.
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
    """While open, makes tensors on the CPU report the type names of CUDA tensors.

    The distributed optimizer sorts parameters by these names when it is built, and rejects those of a CPU.
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
