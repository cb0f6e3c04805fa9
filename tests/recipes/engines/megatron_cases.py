"""Trains tiny mixtures under megatron-core and under the native engine, in one process for all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.routers.deepseek_v3 import DeepSeekV3Config, DeepSeekV3Router
from moe.upcycle.copies import Copy, CopyConfig
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines import MicroBatch
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.megatron.hf_weights import LocalParameter, gathered, live_tensors, locate
from recipes.engines.megatron.megatron_engine import MegatronConfig, MegatronEngine
from recipes.models.hf.ffn_surgery import Surgery, swap
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.interrupt import StopRequest
from recipes.training.training_loop import Loop
from tests.conftest import random_model
from tests.recipes.engines import engine_cases
from tests.recipes.engines.engine_cases import (
    EXPERTS,
    GLOBAL_BATCH,
    SGD,
    VOCABULARY,
    Case,
    Outcome,
    full,
    make_model,
    make_stage,
    open_engine,
)
from tests.recipes.engines.engine_cases import tokens as samples
from tests.recipes.engines.megatron_case_list import (
    CASES,
    FAMILIES,
    MEGATRON_ALONE,
    READS,
    SAME,
    SAVED,
    TRAINED,
    Layout,
    Stages,
)
from tests.recipes.engines.megatron_ends import (
    TroubleError,
    came_before,
    classes,
    comes_late,
    comes_never,
    log_gone,
)
from tests.recipes.engines.megatron_probes import probe
from tests.recipes.engines.megatron_stand_ins import standing_in


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
        crossed: Weights behind a checkpoint that TransformerEngine's experts wrote, trained on by them and
            by ours.
        left: Whether a rank that left a layout early waited for one that came late, and all was freed.
        given_up: Whether a rank that left in trouble did not wait for others.
        built: By case, the classes of a layer's experts, of their first matrices and of what sends to them.
    """

    trained: dict[Layout, dict[str, Outcome]] = field(default_factory=dict)
    written: dict[Layout, dict[str, Tensor]] = field(default_factory=dict)
    read: dict[tuple[Layout, Layout], dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[Layout, bool] = field(default_factory=dict)
    drift: dict[tuple[str, str], float] = field(default_factory=dict)
    returned: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    probed: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    crossed: list[dict[str, Tensor]] = field(default_factory=list)
    left: bool = False
    given_up: bool = False
    built: dict[str, list[str]] = field(default_factory=dict)


def work(rank: int, world_size: int, folder: str) -> Found:
    """For `run_ranks`: everything that so many ranks do."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    found = Found()
    if world_size == 1:
        own = {name: case for name, case in CASES.items() if name not in SAME}
        found.trained[1, 0, 1] = {name: train(case, (1, 0, 1)) for name, case in own.items()}
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
        _compare(found, "qwen3", "te", layout)
        place = Path(folder) / "te"
        found.built = {name: _run(classes, CASES[name], layout) for name in ("te", "deepep", "hybridep_te")}
        found.crossed = [
            _run(_write, CASES["te"], layout, place),
            _run(_read, CASES["plain"], layout, place, layout),
        ]
        late, sign = CASES["deepep"], Path(folder) / "sign"
        found.left = _run(comes_late, late, layout, _step, sign) and came_before(sign)
        try:
            _run(comes_never, CASES["plain"], layout, sign)
        except TroubleError as error:
            log_gone(rank, sign)
            found.given_up = error.args[0]
    return found


def _model(case: Case) -> HFModel:
    """Of cases of stages: a router with a state of its own, and the blocks that the case says."""
    if not isinstance(case, Stages):
        return make_model(case)
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    model = HFModel(random_model(case.family, **small | case.model), Path(), torch.float32)
    config = DeepSeekV3Config(init_std=0.3, balance_coef=0.1, bias_rate=0.05)
    surgery = Surgery(
        method=Copy(CopyConfig(num_experts=EXPERTS, noise_std=0.5, layers=case.layers)),
        make_router=lambda width, experts: DeepSeekV3Router(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )
    swap(model, surgery)
    return model


def _run(do: Callable[..., Any], case: Case, layout: Layout, *more: Any) -> Any:
    """Does something with an engine and a trainable of a layout, on the open process group."""
    ranks, cut, spread, stages = (*layout, 1)[:4]
    assert ranks == dist.get_world_size()
    if cut == 0:
        native = {key: value for key, value in case.engine.items() if key not in MEGATRON_ALONE}
        engine: Any = open_engine(**native, expert_parallel=spread)
        return do(engine, engine.prepare(_model(case), case.optim), *more)
    config: Any = {"device": "cpu", "threads": 1, "tensor_parallel": cut, "expert_parallel": spread}
    config |= {"pipeline_parallel": stages}
    engine = MegatronEngine(MegatronConfig(**config | case.engine))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    with standing_in(case.engine):
        try:
            return do(engine, engine.prepare(_model(case), case.optim), *more)
        finally:
            engine.leave()


def train(case: Case, layout: Layout) -> Outcome:
    """Runs a case on this rank, with as many samples in a micro-batch over all ranks as one rank has."""
    micro = case.micro * max(1, layout[1]) * (*layout, 1)[3] // layout[0]
    return _run(_train, case, layout, replace(case, micro=micro))


def _train(engine: Any, train_module: Any, case: Case) -> Outcome:
    outcome = Outcome()
    _look_before_first_step(train_module, outcome)
    with tempfile.TemporaryDirectory() as folder:
        folder = engine.broadcast(folder)
        stage = make_stage(case, train_module, Path(folder))
        Loop(engine, [engine_cases._Record(outcome)], StopRequest()).run(stage)
        engine.barrier()
    outcome.weights = _weights(train_module)
    outcome.notes = {"updates": [layer.context.run.step for layer in train_module.model.routed_layers()]}
    return outcome


def _look_before_first_step(train_module: Any, outcome: Outcome) -> None:
    """Keeps the gradients of the first step: the step itself clears them."""
    original = train_module.step

    def step(lr_factor: float, norm_limit: float) -> Tensor:
        if not outcome.grads:
            outcome.grads = gradients(train_module)
        return original(lr_factor, norm_limit)

    train_module.step = step


def gradients(train_module: Any) -> dict[str, Tensor]:
    """In full, by the host's names, where the distributed optimizer leaves them whole."""
    if not hasattr(train_module, "chunk"):
        named = train_module.model.module.named_parameters()
        return {name: full(p.grad) for name, p in named if p.grad is not None}
    groups, divided = train_module.groups, train_module.chunk.ddp_config.use_distributed_optimizer
    held = [
        LocalParameter(each.tensor.main_grad, each.blocks, each.sharded_over)
        for each in train_module.local
        if each.tensor.requires_grad
        and not (divided and groups.holders(each.sharded_over, sharded=True)[0].size() > 1)
    ]
    blocks = live_tensors(held)
    known = locate(blocks, groups)
    names = [name for name, _ in train_module.skeleton.module.named_parameters() if name in known]
    return {name: grad.clone() for name, grad in gathered(blocks, groups, names, train_module.device)}


def _weights(train_module: Any) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in train_module.full_tensors()}


def _step(engine: Any, train_module: Any, step: int) -> Tensor:
    share = GLOBAL_BATCH // engine.data_ranks
    batch = samples(step * GLOBAL_BATCH + engine.data_rank * share, share)
    train_module.forward_backward([MicroBatch(torch.from_numpy(batch))])
    return train_module.step(1.0)


def _write(engine: Any, train_module: Any, folder: Path) -> dict[str, Tensor]:
    for step in range(SAVED):
        _step(engine, train_module, step)
    save_checkpoint(_place(folder, engine), SAVED, train_module.checkpoint_tensors(), {})
    _step(engine, train_module, SAVED)
    return _weights(train_module)


def _read(engine: Any, train_module: Any, folder: Path, source: Layout) -> dict[str, Tensor]:
    written = folder / "x".join(map(str, source)) / f"step-{SAVED:08d}"
    # What is not read must show: nothing of the model that is there already may count.
    _step(engine, train_module, 7)
    load_checkpoint(written, train_module.checkpoint_tensors())
    train_module.model.context.step = SAVED
    _step(engine, train_module, SAVED)
    return _weights(train_module)


def _place(folder: Path, engine: Any) -> Path:
    config, native = engine.config, engine.name == "native"
    cut, stages = (0, 1) if native else (config.tensor_parallel, config.pipeline_parallel)
    layout = (engine.world_size, cut, config.expert_parallel, stages)
    return folder / "x".join(map(str, layout if stages > 1 else layout[:3]))


def _refuses(engine: Any, train_module: Any) -> bool:
    before = _weights(train_module)
    share = GLOBAL_BATCH // engine.data_ranks
    batch = torch.from_numpy(samples(engine.data_rank * share, share))
    if engine.rank == 1:
        # An expert's, which no other rank may hold.
        expert = next(each.tensor for each in train_module.local if each.sharded_over == "expert")
        expert.main_grad.fill_(float("nan"))
    train_module.forward_backward([MicroBatch(batch)])
    norm = train_module.step(1.0)
    after = _weights(train_module)
    same = all(torch.equal(after[name], weight) for name, weight in before.items())
    return same and not bool(torch.isfinite(norm)) and train_module.model.context.step == 0


def _compare(found: Found, family: str, whose: str, layout: Layout) -> None:
    """Logits and weights of a model whose weights went in, against the host that they came from."""
    case = Case(family=family, model=FAMILIES[family])
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2} | FAMILIES[family]
    model = (
        HFModel(random_model(family, **small), Path(), torch.float32) if whose == "none" else make_model(case)
    )
    # An odd number of tokens: where sequences are cut, the last part is shorter.
    ids = torch.from_numpy(samples(0, 3))[:, :11]
    model.module.eval()
    with torch.no_grad():
        wanted = model.module(input_ids=ids).logits
    tensors = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    _, cut, spread, stages = (*layout, 1)[:4]
    config: Any = {"tensor_parallel": cut, "expert_parallel": spread, "pipeline_parallel": stages}
    experts = whose if whose in expert_kinds() else "graft"
    config |= {"device": "cpu", "threads": 1, "experts": experts}
    engine = MegatronEngine(MegatronConfig(**config))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    with standing_in(config):
        train_module = engine.prepare(model, SGD)
    found.drift[family, whose] = float((train_module.logits(ids) - wanted).abs().max() / wanted.abs().max())
    back = dict(train_module.full_tensors())
    odd = [name for name in tensors.keys() & back.keys() if not torch.equal(tensors[name], back[name])]
    found.returned[family, whose] = sorted({*odd, *(tensors.keys() ^ back.keys())})
    engine.leave()
