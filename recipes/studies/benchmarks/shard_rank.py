"""One rank of the measurement of sharded upcycling: ``python -m recipes.studies.benchmarks.shard_rank JSON``.

Memory that libraries take on first use is excluded: everything first runs once with a tiny model.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle import upcycle_methods
from recipes.checkpoint import local_memory
from recipes.engines import engine_classes
from recipes.engines.base import Engine, TrainModule
from recipes.engines.optim.config import OptimConfig
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.machine_memory import peak_resident_bytes
from recipes.upcycling.convert.moe_plan import MoERequest, plan_moe
from recipes.upcycling.sharded.sharded_check import measure_shards
from recipes.upcycling.sharded.sharded_models import materialize, moe_model

_TOKENS = 64
_CLEAR = Path("/proc/self/clear_refs")
_TASKS = Path("/proc/self/task")
_LOOK_S = 0.001
_MMAP_BYTES = 1 << 16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class RankTask:
    """Task of one rank.

    Attributes:
        dense: The dense checkpoint.
        tiny: A small one, to begin with.
        out: Folder of the results.
        method: A name of `moe.upcycle`.
        experts: Experts of each layer.
        engine: Fields of the engine's config, including its name.
        whole: True if every rank makes the whole MoE before it keeps its shard.
    """

    dense: str
    tiny: str
    out: str
    method: str
    experts: int
    engine: dict[str, Any]
    whole: bool


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes.

    Attributes:
        moe: Weights of the whole MoE in fp32.
        dense: Weights of the dense model.
        layer: Weights of its largest block.
        outside: Weights outside of its blocks.
        shard: Weights of the MoE that this rank keeps.
        besides: Further memory of an engine that is ready to train, such as gradient buffers.
        making: Peak while the shard was made, beyond earlier memory.
        check: Peak of the equivalence check until the shard is made; None where it was left out.
        read: Bytes read from files while the shard was made.
    """

    moe: int
    dense: int
    layer: int
    outside: int
    shard: int
    besides: int
    making: int
    check: int | None
    read: int


class PeakMeter:
    """Meter of the peak memory since its start, beyond the memory held then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            # Memory freed by earlier work returns to the system before anything is counted.
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")
            self._before = _resident_bytes()

    def held(self) -> int:
        """Returns the bytes held now."""
        gc.collect()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        ctypes.CDLL(None).malloc_trim(0)
        return _resident_bytes() - self._before

    def peak(self) -> int:
        """Returns the peak in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return peak_resident_bytes() - self._before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def measure(engine: Engine[Any], task: RankTask, dense: Path) -> RankMemory:
    """Makes an MoE and measures its memory. Collective."""
    config = upcycle_methods()[task.method].config_class(name=task.method, num_experts=task.experts)
    read, meter = _read_bytes(), PeakMeter(engine.device)
    model = moe_model(plan_moe(MoERequest(dense, config, TopKConfig())))
    made = _ready(engine, materialize(model) if task.whole else model)
    making, read, held = meter.peak(), _read_bytes() - read, meter.held()
    model = made.skeleton if isinstance(made, TrainModule) else made
    blocks = [_bytes(block.parameters()) for block in decoder_blocks(model.module, model.config)]
    every = _bytes(model.module.parameters())
    experts = sum(_bytes(layer.experts.parameters()) for _, layer in model.moe_layers())
    shard = _bytes(_weights(made))
    del model, made
    check = None if task.whole else _check_peak(engine, dense, config)
    return RankMemory(
        moe=every,
        dense=every - experts + experts // task.experts,
        layer=max(blocks),
        outside=every - sum(blocks),
        shard=shard,
        besides=max(0, held - shard),
        making=making,
        check=check,
        read=read,
    )


def _ready(engine: Engine[Any], model: HFModel) -> TrainModule | HFModel:
    """Moves the MoE to where its weights stay during training."""
    if not engine.trains_as_sharded:
        return engine.prepare(model, OptimConfig())
    engine.shard_for_eval(model)
    return model


def _weights(made: TrainModule | HFModel) -> list[Tensor]:
    """Returns the memory of an MoE's weights and buffers on this rank."""
    if isinstance(made, TrainModule):
        named = made.checkpoint_tensors().items()
        return [part for name, value in named if name.startswith("model.") for part in local_memory(value)]
    return [*(_local(p) for p in made.module.parameters()), *made.module.buffers()]


def _check_peak(engine: Engine[Any], dense: Path, config: Any) -> int:
    """Measures the peak of the equivalence check, with few tokens to exclude activations."""
    plan = plan_moe(MoERequest(dense, config, TopKConfig()))
    meter = PeakMeter(engine.device)
    tokens_BS = torch.arange(_TOKENS)[None] % plan.names.config.vocab_size
    # Memory must be freed by reference counts alone, not by chance.
    gc.disable()
    hook = register_module_forward_pre_hook(_settle)
    try:
        _, weights = measure_shards(engine, plan, tokens_BS)
        if not engine.trains_as_sharded:
            # The checked weights are gone, and are made once more.
            engine.prepare(moe_model(plan, weights=weights), OptimConfig())
        return meter.peak()
    finally:
        hook.remove()
        gc.enable()


def _settle(module: nn.Module, args: Any) -> None:
    """Waits before a layer is gathered until no other thread of this process runs.

    A thread of gloo lets go of the buffer of the last layer after that has been waited for: on a busy machine
    so much later that the next buffer is there as well.
    """
    if isinstance(module, FSDPModule):
        while _others_run():
            time.sleep(_LOOK_S)


def _others_run() -> bool:
    own = str(threading.get_native_id())
    for thread in _TASKS.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            state = (thread / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            if thread.name != own and state == "R":
                return True
    return False


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _return_what_is_freed() -> None:
    """Makes every larger block the system's own, so that what is freed is gone from the resident set."""
    if sys.platform == "linux":
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, _MMAP_BYTES)


def main(read: Callable[[], str] = lambda: sys.argv[1]) -> None:
    """Measures, and writes ``rank-N.json``."""
    task = RankTask(**json.loads(read()))
    _return_what_is_freed()
    kind = engine_classes()[task.engine["name"]]
    engine = kind(kind.config_class(**task.engine))
    engine.open()
    try:
        measure(engine, task, Path(task.tiny))
        found = measure(engine, task, Path(task.dense))
        path = Path(task.out) / f"rank-{engine.rank}.json"
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
        engine.barrier()
    finally:
        engine.close()


if __name__ == "__main__":
    main()
