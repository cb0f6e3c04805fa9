"""Trainings under all layouts of the native engine, and checkpoints that one writes and another reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines.micro_batch import MicroBatch
from recipes.engines.native.native_engine import NativeTrainModule
from tests.recipes.engines import engine_cases
from tests.recipes.engines.case_list import ALONE
from tests.recipes.engines.engine_cases import (
    GLOBAL_BATCH,
    Case,
    Outcome,
    full,
    make_model,
    open_engine,
    run_cases,
)
from tests.recipes.engines.engine_cases import tokens as samples
from tests.recipes.engines.test_native_ranks import relative
from tests.shared_runs import Lazily, on_ranks, shared_folder


class Layout(NamedTuple):
    """So many ranks, laid out.

    Attributes:
        ranks: All of them.
        spread: Over which the experts are spread.
        replicas: Groups that hold the same.
        heads: Ranks over which heads are spread.
    """

    ranks: int
    spread: int = 1
    replicas: int = 1
    heads: int = 1

    @property
    def engine(self) -> dict[str, int]:
        """Fields of `NativeConfig`."""
        return {
            "expert_parallel": self.spread,
            "replicas": self.replicas,
            "tensor_parallel": self.heads,
        }


# One rank trains every case; how many experts there are where it is not four.
NAMES = ("fsdp", "fsdp_recomputing", "adamw", "muon", "clipped", "one_expert", "biases", "lora", "bf16")
FEW = {"two_experts": 2}
TRAINED: dict[Layout, tuple[str, ...]] = {
    Layout(1): (*NAMES, "two_experts"),
    Layout(2, 2): NAMES[1:],
    Layout(4, 2): ("fsdp_recomputing", "two_experts"),
    Layout(4, 4): ("fsdp_recomputing",),
    Layout(2, replicas=2): ("clipped", "lora"),
    Layout(4, replicas=2): ("fsdp_recomputing",),
    Layout(4, 2, replicas=2): ("muon",),
    Layout(2, heads=2): ("fsdp", "clipped", "muon", "lora", "bf16"),
    Layout(4, 2, heads=2): ("fsdp_recomputing",),
    Layout(4, 2, replicas=2, heads=2): ("adamw",),
}
# Who wrote a checkpoint, and who goes on from it.
Read = tuple[Layout, Layout]
REFUSING = (Layout(2, 2), Layout(2, replicas=2), Layout(2, heads=2))
# Norms of single heads; biases; one matrix for all three, and a bias behind the rows.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gpt_neox": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
}
LAYOUTS = (*TRAINED, Layout(2))
# After these many steps a checkpoint is written, and one more step is done.
SAVED = 2


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

    def _layouts(self) -> list[Layout]:
        return [layout for layout in TRAINED if layout.ranks == self.world_size]

    @property
    def trained(self) -> Mapping[Layout, dict[str, Outcome]]:
        """By layout and case."""
        return Lazily(self._layouts(), lambda layout: self._of(_train, layout))

    @property
    def written(self) -> Mapping[Layout, dict[str, Tensor]]:
        """Weights after the step behind the checkpoint, by the layout that wrote it."""
        return Lazily(self._layouts(), lambda layout: self._of(_write, _folder(), layout))

    @property
    def read(self) -> Mapping[Read, dict[str, Tensor]]:
        """The same, by the layout that wrote the checkpoint and that which went on from it."""

        def read(pair: Read) -> dict[str, Tensor]:
            assert found()[pair[0].ranks][0].written[pair[0]]
            return self._of(_read, _folder(), *pair)

        return Lazily([(source, layout) for source in TRAINED for layout in LAYOUTS], read)

    @property
    def refused(self) -> dict[Layout, bool]:
        """By layout, whether a gradient that is not finite on one rank updated nothing on this one."""
        return {layout: self._of(_refuses, layout) for layout in REFUSING}

    @property
    def families(self) -> dict[str, tuple[float, str]]:
        """By family, the largest error of a gradient when heads are spread, and whose."""
        return {family: self._of(_family_error, family) for family in FAMILIES}

    @property
    def samples(self) -> Mapping[Layout, list[int]]:
        """By layout, the ranks whose tokens routers see together."""
        return Lazily(self._layouts(), lambda layout: self._of(samples_of, layout))

    @property
    def noisy(self) -> tuple[float, int]:
        """The loss under dropout when heads are spread, and how often those ranks summed something."""
        return self._of(_noisy_loss)


def found() -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    return {world: [Found(world, rank) for rank in range(world)] for world in (1, 2, 4)}


def _folder() -> Path:
    return shared_folder("expert-parallel")


def _case(name: str, layout: Layout) -> Case:
    case = ALONE["muon" if name in FEW else name]
    micro = case.micro // layout.ranks * layout.heads
    return replace(case, micro=micro, engine=case.engine | layout.engine)


def _train(layout: Layout) -> dict[str, Outcome]:
    names = TRAINED[layout]
    done = run_cases({n: _case(n, layout) for n in names if n not in FEW})
    for name in set(names) & set(FEW):
        with patch.object(engine_cases, "EXPERTS", FEW[name]):
            done |= run_cases({name: _case(name, layout)})
    return done


def samples_of(layout: Layout) -> list[int]:
    """The ranks whose tokens routers see together, of which this one is. Collective."""
    group = _prepared(layout).model.context.group
    assert group is not None
    return dist.get_process_group_ranks(group)


def _prepared(layout: Layout, recomputes: bool = False) -> NativeTrainModule:
    case = ALONE["adamw"]
    engine = open_engine(activation_checkpointing=recomputes, **layout.engine)
    return engine.prepare(make_model(case), case.optim)


def _step(train_module: NativeTrainModule, step: int) -> Tensor:
    engine = train_module.engine
    share = GLOBAL_BATCH // engine.data_ranks
    batch = samples(step * GLOBAL_BATCH + engine.data_rank * share, share)
    train_module.forward_backward([MicroBatch(torch.from_numpy(batch))])
    return train_module.step(1.0)


def _weights(train_module: NativeTrainModule) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in train_module.full_tensors()}


def _write(folder: Path, layout: Layout) -> dict[str, Tensor]:
    train_module = _prepared(layout)
    for step in range(SAVED):
        _step(train_module, step)
    save_checkpoint(_place(folder, layout), SAVED, train_module.checkpoint_tensors(), {})
    _step(train_module, SAVED)
    return _weights(train_module)


def _read(folder: Path, source: Layout, layout: Layout) -> dict[str, Tensor]:
    # Recomputation ends here where it ends by default: after the last tensor that backward needs.
    train_module = _prepared(layout, recomputes=True)
    tensors: dict[str, Any] = train_module.checkpoint_tensors()
    for tensor in tensors.values():
        tensor.fill_(7)
    load_checkpoint(_place(folder, source) / f"step-{SAVED:08d}", tensors)
    _step(train_module, SAVED)
    return _weights(train_module)


def _place(folder: Path, layout: Layout) -> Path:
    return folder / "x".join(str(number) for number in layout)


def _refuses(layout: Layout) -> bool:
    train_module, rank = _prepared(layout), dist.get_rank()
    before = _weights(train_module)
    train_module.forward_backward([MicroBatch(torch.from_numpy(samples(4 * rank, 4)))])
    if rank == 1:
        grad = train_module.model.moe_layers()[0][1].experts.w_up_EUD.grad
        grad.to_local().flatten()[0] = float("nan")
    norm = train_module.step(1.0)
    after = _weights(train_module)
    return not bool(torch.isfinite(norm)) and all(torch.equal(after[name], before[name]) for name in before)


def _family_error(family: str) -> tuple[float, str]:
    """Against plain torch on this rank alone."""
    case = Case(family=family, model=FAMILIES[family])
    ids_BS1 = torch.from_numpy(samples(0, GLOBAL_BATCH))
    plain = make_model(case).module.train()
    logits = plain(input_ids=ids_BS1[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), ids_BS1[:, 1:].flatten()).backward()
    cut = open_engine(tensor_parallel=2).prepare(make_model(case), case.optim)
    cut.forward_backward([MicroBatch(ids_BS1)])
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    errors = [
        (relative(full(parameter.grad), wanted[name]), name)
        for name, parameter in cut.model.module.named_parameters()
    ]
    assert len(errors) == len(wanted)
    return max(errors)


def _noisy_loss() -> tuple[float, int]:
    """Of the same samples on every rank, whose random states differ before."""
    case = Case(family="gpt_neox", model={"attention_dropout": 0.0, "hidden_dropout": 0.5})
    train_module = open_engine(tensor_parallel=2).prepare(make_model(case), case.optim)
    torch.manual_seed(dist.get_rank())
    with CommDebugMode() as counted:
        (loss,) = train_module.forward_backward([MicroBatch(torch.from_numpy(samples(0, GLOBAL_BATCH)))])
    return float(loss), counted.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
