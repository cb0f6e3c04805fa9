"""Trains tiny MoE models under megatron-core and under the native engine, each layout on ranks of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.deepseek_v3 import DeepSeekV3Router
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.data.samples import TokenMetadata
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.megatron.hf_weights import LocalParameter, gathered, live_tensors, locate
from recipes.engines.megatron.megatron_engine import MegatronConfig, MegatronEngine
from recipes.engines.micro_batch import MicroBatch
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
    RICH,
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
from tests.recipes.models.whole_surgery import Surgery, swap
from tests.shared_runs import Lazily, on_ranks, shared_folder

NATIVE: Layout = (1, 0, 1)
# Two ranks that cut both matrices and experts.
PAIR: Layout = (2, 2, 2)


@dataclass(frozen=True)
class Found:
    """What a rank finds; each part is run when it is first asked for.

    Attributes:
        world_size: Number of ranks that were started.
        rank: Which of them this is.
    """

    world_size: int
    rank: int

    def _of(self, fn: Callable[..., Any], *args: Any) -> Any:
        return on_ranks(self.world_size, fn, *args)[self.rank]

    @property
    def trained(self) -> Mapping[Layout, dict[str, Outcome]]:
        """By layout and case."""
        layouts = [layout for layout in (NATIVE, *TRAINED) if layout[0] == self.world_size]
        return Lazily(layouts, lambda layout: self._of(train_all, layout))

    @property
    def written(self) -> Mapping[Layout, dict[str, Tensor]]:
        """Weights after the step behind the checkpoint, by the layout that wrote it."""
        return Lazily(READS, lambda layout: self._of(_run, _write, CASES["rich"], layout, _folder()))

    @property
    def read(self) -> Mapping[tuple[Layout, Layout], dict[str, Tensor]]:
        """The same, by the layout that wrote the checkpoint and the one that went on from it."""

        def read(pair: tuple[Layout, Layout]) -> dict[str, Tensor]:
            source, layout = pair
            assert found()[source[0]][0].written[source]
            return self._of(_run, _read, CASES["rich"], layout, _folder(), source)

        return Lazily([(source, layout) for source in READS for layout in READS[source]], read)

    @property
    def refused(self) -> dict[Layout, bool]:
        """Whether a loss that is not finite on one rank updated nothing on this one."""
        layouts: list[Layout] = [(2, 1, 1), (2, 1, 2), (2, 2, 2), (2, 1, 1, 2)]
        return {layout: self._of(_run, _refuses, CASES["plain"], layout) for layout in layouts}

    def compared(self, family: str, whose: str) -> tuple[float, list[str]]:
        """How far logits are from the model's, and which tensors did not come back as they went in.

        By family and whose experts (none: dense; stages: ours, in two stages).
        """
        layout: Layout = (self.world_size, min(2, self.world_size), min(2, self.world_size))
        return self._of(_compare, family, whose, (2, 1, 1, 2) if whose == "stages" else layout)

    @property
    def probed(self) -> dict[str, tuple[str | None, str | None]]:
        """See `probe`."""
        return self._of(probe)

    @property
    def crossed(self) -> list[dict[str, Tensor]]:
        """Weights behind a checkpoint of TransformerEngine's experts, trained on by them and by ours."""
        return self._of(_cross, _folder() / "te")

    @property
    def left(self) -> bool:
        """Whether a rank that left a layout early waited for one that came late, and all was freed."""
        return self._of(_leave, _folder() / "late")

    @property
    def given_up(self) -> bool:
        """Whether a rank that left in trouble did not wait for others."""
        return self._of(_give_up, _folder() / "gone")

    @property
    def built(self) -> dict[str, list[str]]:
        """By case, the classes of a layer's experts, of their first matrices and of what sends to them."""
        return {name: self._of(_run, classes, CASES[name], PAIR) for name in ("te", "deepep", "hybridep_te")}


def found() -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    return {world: [Found(world, rank) for rank in range(world)] for world in (1, 2, 4)}


def _folder() -> Path:
    return shared_folder("megatron")


def train_all(layout: Layout) -> dict[str, Outcome]:
    """Trains every case of a layout."""
    own = tuple(name for name in CASES if name not in SAME)
    return {name: train(CASES[name], layout) for name in (own if layout == NATIVE else TRAINED[layout])}


def _cross(folder: Path) -> list[dict[str, Tensor]]:
    return [
        _run(_write, CASES["te"], PAIR, folder),
        _run(_read, CASES["plain"], PAIR, folder, PAIR),
    ]


def _leave(sign: Path) -> bool:
    return _run(comes_late, CASES["deepep"], PAIR, _step, sign) and came_before(sign)


def _give_up(sign: Path) -> bool:
    try:
        _run(comes_never, CASES["plain"], PAIR, sign)
    except TroubleError as error:
        log_gone(dist.get_rank(), sign)
        return bool(error.args[0])
    return False


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
    # The native engine's losses, which these are compared with, are computed in one piece.
    by_rows = layout[1] > 0 and case.optim is RICH
    return _run(_train, case, layout, replace(case, micro=micro, by_rows=by_rows))


def _train(engine: Any, train_module: Any, case: Case) -> Outcome:
    outcome = Outcome()
    _look_before_first_step(train_module, outcome)
    with tempfile.TemporaryDirectory() as folder:
        folder = engine.broadcast(folder)
        stage = make_stage(case, train_module, Path(folder))
        with case.memory():
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


def _compare(family: str, whose: str, layout: Layout) -> tuple[float, list[str]]:
    """Compares logits and weights of a model whose weights went in with the model that they came from."""
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
        # Documents of four and six inputs, each alone.
        alone = torch.cat(
            [model.module(input_ids=ids[:, part]).logits for part in (slice(4), slice(4, 10))], 1
        )
        losses = F.cross_entropy(alone.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 10)
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
    drift = float((train_module.logits(ids) - wanted).abs().max() / wanted.abs().max())
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]).expand(3, -1)
    packed = train_module.token_losses(ids, TokenMetadata(None, None, positions))
    drift = max(drift, float((packed - losses).abs().max() / losses.max()))
    back = dict(train_module.full_tensors())
    odd = [name for name in tensors.keys() & back.keys() if not torch.equal(tensors[name], back[name])]
    engine.leave()
    return drift, sorted({*odd, *(tensors.keys() ^ back.keys())})
