"""Trains tiny mixtures under megatron-core and under the native engine, in one process for all of them.

A layout is ``(ranks, tensor_parallel, expert_parallel)``, and where there are several stages their number as
well; the native engine's has 0 in the middle.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.routers.deepseek_v3 import DeepSeekV3Config, DeepSeekV3Router
from moe.upcycle.copies import Copy, CopyConfig
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines import MicroBatch
from recipes.engines.megatron import MegatronConfig, MegatronEngine
from recipes.hosts.huggingface import HuggingFaceHost, Surgery, swap
from recipes.hosts.megatron import Held, gathered, live_blocks, whereabouts
from recipes.interrupt import StopRequest
from recipes.loop import Loop
from recipes.lr_schedule import ScheduleConfig
from recipes.optim import FrozenConfig, OptimConfig
from tests.conftest import random_model
from tests.engines import engine_cases
from tests.engines.engine_cases import (
    EXPERTS,
    GLOBAL_BATCH,
    SGD,
    VOCABULARY,
    Case,
    Outcome,
    full,
    make_host,
    make_leg,
    open_engine,
)
from tests.engines.engine_cases import tokens as samples
from tests.engines.megatron_probes import probe

Layout: TypeAlias = tuple[int, ...]

FAMILIES: dict[str, dict[str, Any]] = {
    # A rope base and an epsilon of its own, so that neither is a default that happens to be right.
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": 24, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4},
}
_CONSTANT = ScheduleConfig("constant", warmup_steps=0)
# Frozen experts, two learning rates, decay, a clip that bites, in two micro-batches. With a small eps the
# sign of what rounding leaves of a gradient of 0 would decide where a weight goes, on the native engine too.
RICH = OptimConfig(
    lr=3e-3, eps=1e-3, router_lr_scale=2.0, clip_norm=0.5, frozen=FrozenConfig(steps=1), schedule=_CONSTANT
)
_RECOMPUTE: dict[str, Any] = {"activation_checkpointing": True}
_PLAIN: dict[str, Any] = {"distributed_optimizer": False}
_THEIRS: dict[str, Any] = {"experts": "megatron"}


@dataclass(frozen=True)
class Stages(Case):
    """A case whose routers have a state that changes between steps.

    Attributes:
        layers: Blocks that are mixtures.
    """

    layers: str = "all"


CASES: dict[str, Case] = {
    "plain": Case(micro=4),
    "rich": Case(micro=4, optim=RICH, steps=4, engine=_RECOMPUTE),
    "theirs": Case(micro=4, engine=_THEIRS),
    "replicated": Case(micro=4, optim=RICH, steps=4, engine=_PLAIN),
    "replicated_theirs": Case(micro=4, engine=_PLAIN | _THEIRS),
    "dead_experts": Case(router_weights="equal", steps=1),
    "tied": Case(family="qwen2", model={"tie_word_embeddings": True}),
    "norms": Case(family="qwen3", optim=RICH, steps=2),
    # Blocks that do not divide over stages, a state of the routers, an embedding in the first and last stage,
    # and so many micro-batches that recomputation in one comes after forward passes of the next.
    "deep": Stages(
        family="qwen2",
        model={"num_hidden_layers": 5, "tie_word_embeddings": True},
        micro=2,
        engine=_RECOMPUTE,
    ),
    # Mixtures in the last block alone.
    "half": Stages(layers="last:1", engine=_THEIRS, micro=4, optim=RICH, steps=2),
    "fp32": Case(steps=2),
    "lora": Case(micro=4, optim=RICH, steps=3, lora=4),
    "bf16": Case(engine={"precision": "bf16"}, steps=2),
    "bf16_replicated": Case(engine={"precision": "bf16"} | _PLAIN | _THEIRS, steps=2),
    "long": Case(optim=replace(SGD, lr=0.1), steps=50, eval_samples=4),
}
_BF16 = ("bf16", "bf16_replicated")
TRAINED: dict[Layout, tuple[str, ...]] = {
    (1, 1, 1): ("plain", "rich", "replicated_theirs", "dead_experts", *_BF16, "tied", "norms"),
    (2, 1, 1): ("plain", "rich", "replicated"),
    (2, 1, 2): ("rich", "theirs", "lora", "replicated", "replicated_theirs", "dead_experts", *_BF16, "long"),
    (2, 2, 1): ("rich", "replicated", "bf16", "tied", "norms", "long"),
    (2, 2, 2): ("rich", "replicated_theirs", "lora"),
    (4, 2, 2): ("rich", "replicated_theirs"),
    (2, 1, 1, 2): ("rich", "fp32", "deep", "replicated_theirs", "bf16", "long"),
    # Whose first rank keeps frozen weights alone.
    (4, 1, 1, 2): ("rich", "replicated_theirs"),
    (4, 1, 2, 2): ("deep", "half", "replicated_theirs"),
    (4, 2, 2, 2): ("deep",),
    (4, 1, 1, 4): ("deep",),
}
# After these many steps a checkpoint is written, and one more step is done.
SAVED = 2
# Who writes, and who goes on from it; two ranks before one and four.
READS: dict[Layout, tuple[Layout, ...]] = {
    (2, 0, 1): ((2, 1, 2), (2, 2, 1), (1, 1, 1), (4, 2, 2), (2, 1, 1, 2)),
    (2, 1, 2): ((2, 0, 2), (2, 2, 2), (1, 0, 1)),
    (2, 2, 1): ((2, 0, 1), (2, 1, 1), (4, 2, 2)),
    (2, 1, 1, 2): ((1, 1, 1), (2, 0, 1), (4, 1, 2, 2)),
}


@dataclass
class Found:
    """What a rank has found.

    Attributes:
        trained: By layout and case.
        written: Weights after the step behind the checkpoint, by the layout that wrote it.
        read: The same, by the layout that wrote the checkpoint and the one that went on from it.
        refused: Whether a loss that is not finite on one rank updated nothing on this one.
        drift: By family and whose experts (none: dense; stages: ours, in two stages), how far logits are from
            the host's.
        returned: The same, which tensors did not come back as they went in.
        probed: See `probe`.
    """

    trained: dict[Layout, dict[str, Outcome]] = field(default_factory=dict)
    written: dict[Layout, dict[str, Tensor]] = field(default_factory=dict)
    read: dict[tuple[Layout, Layout], dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[Layout, bool] = field(default_factory=dict)
    drift: dict[tuple[str, str], float] = field(default_factory=dict)
    returned: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    probed: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)


def work(rank: int, world_size: int, folder: str) -> Found:
    """For `run_ranks`: everything that so many ranks do."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    found = Found()
    if world_size == 1:
        found.trained[1, 0, 1] = {name: train(case, (1, 0, 1)) for name, case in CASES.items()}
    for layout, names in TRAINED.items():
        if layout[0] == world_size:
            found.trained[layout] = {name: train(CASES[name], layout) for name in names}
    for layout in READS:
        if layout[0] == world_size:
            found.written[layout] = _run(_write, CASES["rich"], layout, Path(folder))
    for source, readers in READS.items():
        for layout in readers:
            if layout[0] == world_size:
                found.read[source, layout] = _run(_read, CASES["rich"], layout, Path(folder), source)
    if world_size == 2:
        found.probed = probe()
        layouts: list[Layout] = [(2, 1, 1), (2, 1, 2), (2, 2, 2), (2, 1, 1, 2)]
        found.refused = {layout: _run(_refuses, CASES["plain"], layout) for layout in layouts}
    layout = (world_size, min(2, world_size), min(2, world_size))
    for family in FAMILIES if world_size < 4 else ():
        for whose in ("none", "graft", "megatron"):
            _compare(found, family, whose, layout)
    if world_size == 2:
        _compare(found, "qwen2", "stages", (2, 1, 1, 2))
    return found


def _host(case: Case) -> HuggingFaceHost:
    """Of cases of stages: a router with a state of its own, and the blocks that the case says."""
    if not isinstance(case, Stages):
        return make_host(case)
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    host = HuggingFaceHost(random_model(case.family, **small | case.model), Path(), torch.float32)
    config = DeepSeekV3Config(init_std=0.3, balance_coef=0.1, bias_rate=0.05)
    surgery = Surgery(
        method=Copy(CopyConfig(num_experts=EXPERTS, noise_std=0.5, layers=case.layers)),
        make_router=lambda width, experts: DeepSeekV3Router(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )
    swap(host, surgery)
    return host


def _run(do: Callable[..., Any], case: Case, layout: Layout, *more: Any) -> Any:
    """Does something with an engine and a trainable of a layout, on the open process group."""
    ranks, cut, spread, stages = (*layout, 1)[:4]
    assert ranks == dist.get_world_size()
    if cut == 0:
        native = {key: value for key, value in case.engine.items() if key not in _PLAIN | _THEIRS}
        engine: Any = open_engine(**native, expert_parallel=spread)
        return do(engine, engine.prepare(_host(case), case.optim), *more)
    config: Any = {"device": "cpu", "threads": 1, "tensor_parallel": cut, "expert_parallel": spread}
    config |= {"pipeline_parallel": stages}
    engine = MegatronEngine(MegatronConfig(**config | case.engine))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    try:
        return do(engine, engine.prepare(_host(case), case.optim), *more)
    finally:
        engine.leave()


def train(case: Case, layout: Layout) -> Outcome:
    """Runs a case on this rank, with as many samples in a micro-batch over all ranks as one rank has."""
    micro = case.micro * max(1, layout[1]) * (*layout, 1)[3] // layout[0]
    return _run(_train, case, layout, replace(case, micro=micro))


def _train(engine: Any, trainable: Any, case: Case) -> Outcome:
    outcome = Outcome()
    _look_before_first_step(trainable, outcome)
    with tempfile.TemporaryDirectory() as folder:
        folder = engine.broadcast(folder)
        leg = make_leg(case, trainable, Path(folder))
        Loop(engine, [engine_cases._Record(outcome)], StopRequest()).run(leg)
        engine.barrier()
    outcome.weights = _weights(trainable)
    outcome.notes = {"updates": [layer.context.run.step for layer in trainable.host.routed_layers()]}
    return outcome


def _look_before_first_step(trainable: Any, outcome: Outcome) -> None:
    """Keeps the gradients of the first step: the step itself clears them."""
    original = trainable.step

    def step(lr_factor: float, norm_limit: float) -> Tensor:
        if not outcome.grads:
            outcome.grads = gradients(trainable)
        return original(lr_factor, norm_limit)

    trainable.step = step


def gradients(trainable: Any) -> dict[str, Tensor]:
    """In full, by the host's names, where the distributed optimizer leaves them whole."""
    if not hasattr(trainable, "chunk"):
        named = trainable.host.model.named_parameters()
        return {name: full(p.grad) for name, p in named if p.grad is not None}
    places, divided = trainable.places, trainable.chunk.ddp_config.use_distributed_optimizer
    held = [
        Held(each.tensor.main_grad, each.parts, each.over)
        for each in trainable.held
        if each.tensor.requires_grad
        and not (divided and places.holders(each.over, sharded=True)[0].size() > 1)
    ]
    blocks = live_blocks(held)
    known = whereabouts(blocks, places)
    names = [name for name, _ in trainable.skeleton.model.named_parameters() if name in known]
    return {name: grad.clone() for name, grad in gathered(blocks, places, names, trainable.device)}


def _weights(trainable: Any) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in trainable.full_tensors()}


def _step(engine: Any, trainable: Any, step: int) -> Tensor:
    share = GLOBAL_BATCH // engine.data_ranks
    batch = samples(step * GLOBAL_BATCH + engine.data_rank * share, share)
    trainable.accumulate(iter([MicroBatch(torch.from_numpy(batch))]), 1)
    return trainable.step(1.0)


def _write(engine: Any, trainable: Any, folder: Path) -> dict[str, Tensor]:
    for step in range(SAVED):
        _step(engine, trainable, step)
    save_checkpoint(_place(folder, engine), SAVED, trainable.checkpoint_tensors(), {})
    _step(engine, trainable, SAVED)
    return _weights(trainable)


def _read(engine: Any, trainable: Any, folder: Path, source: Layout) -> dict[str, Tensor]:
    written = folder / "x".join(map(str, source)) / f"step-{SAVED:08d}"
    # What is not read must show: nothing of the model that is there already may count.
    _step(engine, trainable, 7)
    load_checkpoint(written, trainable.checkpoint_tensors())
    trainable.host.context.step = SAVED
    _step(engine, trainable, SAVED)
    return _weights(trainable)


def _place(folder: Path, engine: Any) -> Path:
    config, native = engine.config, engine.name == "native"
    cut, stages = (0, 1) if native else (config.tensor_parallel, config.pipeline_parallel)
    layout = (engine.world_size, cut, config.expert_parallel, stages)
    return folder / "x".join(map(str, layout if stages > 1 else layout[:3]))


def _refuses(engine: Any, trainable: Any) -> bool:
    before = _weights(trainable)
    share = GLOBAL_BATCH // engine.data_ranks
    batch = torch.from_numpy(samples(engine.data_rank * share, share))
    if engine.rank == 1:
        # An expert's, which no other rank may hold.
        expert = next(each.tensor for each in trainable.held if each.over == "expert")
        expert.main_grad.fill_(float("nan"))
    trainable.accumulate(iter([MicroBatch(batch)]), 1)
    norm = trainable.step(1.0)
    after = _weights(trainable)
    same = all(torch.equal(after[name], weight) for name, weight in before.items())
    return same and not bool(torch.isfinite(norm)) and trainable.host.context.step == 0


def _compare(found: Found, family: str, whose: str, layout: Layout) -> None:
    """Logits and weights of a model whose weights went in, against the host that they came from."""
    case = Case(family=family, model=FAMILIES[family])
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2} | FAMILIES[family]
    host = (
        HuggingFaceHost(random_model(family, **small), Path(), torch.float32)
        if whose == "none"
        else make_host(case)
    )
    # An odd number of tokens: where sequences are cut, the last part is shorter.
    ids = torch.from_numpy(samples(0, 3))[:, :11]
    host.model.eval()
    with torch.no_grad():
        wanted = host.model(input_ids=ids).logits
    tensors = {name: p.detach().clone() for name, p in host.model.named_parameters()}
    _, cut, spread, stages = (*layout, 1)[:4]
    config: Any = {"tensor_parallel": cut, "expert_parallel": spread, "pipeline_parallel": stages}
    config |= {"device": "cpu", "threads": 1, "experts": "megatron" if whose == "megatron" else "graft"}
    engine = MegatronEngine(MegatronConfig(**config))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    trainable = engine.prepare(host, SGD)
    found.drift[family, whose] = float((trainable.logits(ids) - wanted).abs().max() / wanted.abs().max())
    back = dict(trainable.full_tensors())
    odd = [name for name in tensors.keys() & back.keys() if not torch.equal(tensors[name], back[name])]
    found.returned[family, whose] = sorted({*odd, *(tensors.keys() ^ back.keys())})
    engine.leave()
