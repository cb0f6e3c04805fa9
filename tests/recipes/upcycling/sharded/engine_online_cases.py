"""Has every engine make mixtures in parts, and says where they differ from the same made in one memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe.experts.lora_config import LoraConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.llama_moe_v2_config import LlamaMoEV2Config
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines import engine_classes
from recipes.engines.base import Engine
from recipes.engines.optim.config import OptimConfig
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.models.lora_model import add_low_rank
from recipes.upcycling.convert.moe_plan import MoERequest, open_dense, plan_moe
from recipes.upcycling.sharded.sharded_check import measure_shards
from recipes.upcycling.sharded.sharded_models import dense_model, moe_model
from tests.conftest import VOCABULARY
from tests.moe.routers.routing_cases import METHOD_CONFIGS
from tests.recipes.engines.engine_cases import full, open_engine
from tests.recipes.upcycling.sharded.online_cases import (
    SEED,
    Case,
    fitting_router,
    made_whole,
    plan_of,
    state,
    statistics_of,
)

# Beside those that the engines themselves name, and looked at more closely.
MORE: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("engine=megatron",), ("engine=deepspeed", "engine.zero_stage=3")),
    2: (
        ("engine=megatron", "engine.tensor_parallel=2", "engine.sequence_parallel=true"),
        ("engine=megatron", "engine.precision=bf16", "engine.expert_parallel=2"),
        (
            *("engine=megatron", "engine.pipeline_parallel=2", "engine.precision=bf16"),
            *("engine.distributed_optimizer=false", "engine.experts=megatron"),
        ),
        ("engine=deepspeed", "engine.precision=bf16", "engine.zero_stage=2"),
        ("engine=deepspeed", "engine.precision=bf16", "engine.zero_stage=3", "engine.expert_parallel=2"),
    ),
    4: (
        (
            "engine=megatron",
            *("engine.tensor_parallel=2", "engine.expert_parallel=2", "engine.pipeline_parallel=2"),
        ),
        ("engine=megatron", "engine.precision=bf16", "engine.expert_parallel=2", "engine.experts=megatron"),
        ("engine=deepspeed", "engine.zero_stage=3", "engine.expert_parallel=2"),
        ("engine=deepspeed", "engine.zero_stage=1", "engine.expert_parallel=2"),
    ),
}
NOISY, SHARED = CopyConfig(num_experts=4, noise_std=0.3), SharedDenseConfig(num_experts=4)
LORA = LoraConfig(rank=4)


@dataclass
class Seen:
    """What one rank has seen, each by the options of a layout.

    Attributes:
        differences: What is not the same bit for bit, of every case.
        gate: How far the largest logit of the gate is from the native engine's, relative to it.
    """

    differences: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)


def layouts(world_size: int) -> list[tuple[str, ...]]:
    """The options of every engine on so many ranks."""
    named = [one for kind in engine_classes().values() for one in kind.compared if one.ranks == world_size]
    return [*(one.options for one in named), *MORE[world_size]]


@contextmanager
def opened(options: tuple[str, ...]) -> Iterator[Engine[Any]]:
    """An engine on the process group that is open already."""
    fields: dict[str, Any] = {"device": "cpu", "threads": 1}
    for option in options:
        key, _, value = option.removeprefix("engine").partition("=")
        fields[key.removeprefix(".") or "name"] = value if value.isidentifier() else json.loads(value)
    fields |= {key: value == "true" for key, value in fields.items() if value in ("true", "false")}
    kind = engine_classes()[fields["name"]]
    engine = kind(kind.config_class(**fields))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    try:
        yield engine
    finally:
        getattr(engine, "leave", lambda: None)()


def see(world_size: int, dense: Path) -> Seen:
    """Everything, on this rank; the dense model is one that every engine takes."""
    seen, aligned = Seen(), _Aligned(dense)
    moe, shared = Case(dense, NOISY), Case(dense, SHARED)
    wholes = {"dense": made_whole(Case(dense), {}), "noise": made_whole(moe, {})}
    wholes |= {"factors": made_whole(shared, {})}
    add_low_rank(wholes["factors"], LORA, SEED)
    written = _written(moe)
    for options in layouts(world_size):
        name, found = " ".join(options), dict[str, list[str]]()
        with opened(options) as engine:
            models = {"noise": moe_model(plan_of(moe))}
            if options in MORE[world_size]:
                models |= {"dense": dense_model(open_dense(dense)), "factors": moe_model(plan_of(shared))}
                add_low_rank(models["factors"], LORA, SEED)
            if "experts=megatron" in name:
                # They have no factors.
                del models["factors"]
            for case, model in models.items():
                train_module = engine.prepare(model, OptimConfig())
                found[case] = _differences(train_module, _kept(train_module, state(wholes[case].module)))
            if options in MORE[world_size]:
                train_module = _resumed(engine, moe, written)
                found["resumed"] = _differences(train_module, state(wholes["noise"].module))
            if options in MORE[world_size] and world_size < 4:
                seen.gate[name], found["aligned"] = aligned.compare(engine)
        seen.differences[name] = found
    return seen


def _kept(train_module: Any, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is wanted as the engine keeps it: Megatron what does not train in bf16 alone."""
    if train_module.skeleton is train_module.model or not getattr(train_module, "_keeps_masters", False):
        return wanted
    frozen = {name for name, p in train_module.skeleton.module.named_parameters() if not p.requires_grad}
    return {name: tensor.bfloat16() if name in frozen else tensor for name, tensor in wanted.items()}


def _differences(train_module: Any, wanted: dict[str, Tensor]) -> list[str]:
    """What is not the same bit for bit. Collective."""
    ours = {name: full(tensor) for name, tensor in train_module.full_tensors()}
    found = [f"{name} is in one alone" for name in ours.keys() ^ wanted.keys()]
    for name in ours.keys() & wanted.keys():
        same = ours[name].dtype == wanted[name].dtype and torch.equal(ours[name], wanted[name])
        found += [] if same else [f"{name}: {ours[name].dtype} {tuple(ours[name].shape)}"]
    return found


def _written(case: Case) -> Path:
    """A checkpoint of the native engine."""
    engine = open_engine()
    folder = Path(engine.broadcast(tempfile.mkdtemp()))
    begun = engine.prepare(moe_model(plan_of(case)), OptimConfig())
    save_checkpoint(folder, 1, begun.checkpoint_tensors(), {})
    return folder / "step-00000001"


def _resumed(engine: Engine[Any], case: Case, written: Path) -> Any:
    """A model that a checkpoint was loaded into, where nothing dense can be read."""
    assert case.method is not None
    request = MoERequest(case.dense, case.method, case.router, SEED)
    with patch(
        "recipes.models.safetensors.dense_files.DenseFiles.__init__", side_effect=AssertionError("read")
    ):
        train_module = engine.prepare(moe_model(plan_moe(request, reads=False)), OptimConfig())
        load_checkpoint(written, train_module.checkpoint_tensors())
    return train_module


class _Aligned:
    """A mixture that the gate rescales, as the native engine trains it."""

    def __init__(self, dense: Path) -> None:
        known = next(config for config in METHOD_CONFIGS if isinstance(config, LlamaMoEV2Config))
        config = replace(known, num_experts=2, align_outputs=True, layers="all")
        shape = plan_of(Case(dense, NOISY)).ffns[0].shape
        router = fitting_router(config, shape)
        assert router is not None, config
        self._case = Case(dense, config, router)
        self._statistics = statistics_of(load_model(dense), config, router)
        self._tokens = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
        self._report, train_module = self._made(open_engine())
        self._wanted = {name: full(tensor) for name, tensor in train_module.full_tensors()}
        whole = state(made_whole(self._case, self._statistics).module)
        assert not all(torch.equal(self._wanted[name], whole[name]) for name in whole), "nothing was scaled"

    def _made(self, engine: Engine[Any]) -> tuple[Any, Any]:
        plan = plan_of(self._case, self._statistics)
        report, weights = measure_shards(engine, plan, self._tokens)
        model: HFModel = moe_model(plan, weights=weights)
        return report, engine.prepare(model, OptimConfig())

    def compare(self, engine: Engine[Any]) -> tuple[float, list[str]]:
        """How far the gate's figures are from the native engine's; and what is then trained."""
        report, train_module = self._made(engine)
        ours, theirs = report.logits.max_diff, self._report.logits.max_diff
        return abs(ours - theirs) / theirs, _differences(train_module, self._wanted)
