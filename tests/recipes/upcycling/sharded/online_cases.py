"""Makes mixtures shard by shard and whole, and says where the two differ: one process, many cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch.local import LocalDispatcher
from moe.routers import router_class
from moe.routers.configs import RouterConfig
from moe.routers.configs.analytical_config import AnalyticalConfig
from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.configs.unit_linear_config import UnitLinearConfig
from moe.upcycle import upcycle_methods
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape
from recipes.engines.native.native_engine import NativeEngine
from recipes.engines.optim.config import OptimConfig
from recipes.models.hf.deferred_init import DonatedWeights
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.upcycling.convert.moe_plan import (
    LayerTensors,
    MoEPlan,
    MoERequest,
    open_dense,
    plan_moe,
)
from recipes.upcycling.sharded.sharded_models import dense_model, moe_model
from tests.moe.dispatch.gathered import gathered
from tests.recipes.engines.engine_cases import full, open_engine
from tests.recipes.models.whole_surgery import Surgery, swap

SEED = 3
# The first that a method takes: most average, some sum.
_ROUTERS: tuple[RouterConfig, ...] = (
    TopKConfig(top_k=2),
    OnePlusConfig(top_k=2),
    UnitLinearConfig(top_k=2),
    AnalyticalConfig(top_k=2),
)


@dataclass(frozen=True)
class Case:
    """One mixture.

    Attributes:
        dense: The dense checkpoint.
        method: How it becomes a mixture; None leaves it dense.
        router: Its router.
        engine: Fields of the engine's config.
    """

    dense: Path
    method: UpcycleConfig | None = None
    router: RouterConfig = TopKConfig(top_k=2)
    engine: Mapping[str, Any] = field(default_factory=dict)


def statistics_of(model: HFModel, config: UpcycleConfig, router: RouterConfig) -> LayerTensors:
    """What the method must be told, of random tokens."""
    method = upcycle_methods()[config.name](config).for_router(router)
    if not method.statistics:
        return {}
    return {site.layer: gathered(method, site.weights) for site in find_ffns(model.module, model.config)}


def fitting_router(config: UpcycleConfig, shape: FFNShape) -> RouterConfig | None:
    """The first router that a method takes on a network of this shape."""
    method = upcycle_methods()[config.name](config)
    return next((router for router in _ROUTERS if not method.check(router, shape)), None)


def made_whole(case: Case, statistics: LayerTensors) -> HFModel:
    """The same by loading everything and the surgery in memory."""
    model = load_model(case.dense)
    if case.method is not None:
        surgery = Surgery(
            method=upcycle_methods()[case.method.name](case.method),
            make_router=lambda width, experts: router_class(case.router.name)(case.router, width, experts),
            make_dispatcher=LocalDispatcher,
            backend="auto",
            seed=SEED,
        )
        sources = [load_model(Path(folder)) for folder in surgery.method.sources]
        swap(model, surgery, sources, statistics)
    model.module.eval()
    return model


def plan_of(case: Case, statistics: LayerTensors | None = None) -> MoEPlan:
    """The plan of a case's mixture."""
    assert case.method is not None
    return plan_moe(MoERequest(case.dense, case.method, case.router, SEED), statistics)


def differences(model: HFModel, whole: HFModel) -> list[str]:
    """What is not the same bit for bit: parameters, buffers, what is tied."""
    ours, theirs = _tensors(model.module), _tensors(whole.module)
    found = [f"{name} is in one alone" for name in ours.keys() ^ theirs.keys()]
    for name in sorted(ours.keys() & theirs.keys()):
        mine = full(ours[name])
        if mine.dtype != theirs[name].dtype or not torch.equal(mine, theirs[name]):
            found.append(f"{name}: {mine.dtype} {tuple(mine.shape)}")
    if model.source_dtype != whole.source_dtype:
        found.append(f"dtype of the files: {model.source_dtype}, {whole.source_dtype}")
    if _tied(model.module) != _tied(whole.module):
        found.append(f"tied: {_tied(model.module)}, {_tied(whole.module)}")
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _tied(model: nn.Module) -> set[str]:
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def compare(case: Case) -> list[str]:
    """Differences of what is made in shards, before and after it has moved to the model that trains."""
    engine: NativeEngine = open_engine(**case.engine)
    if case.method is None:
        whole, model = made_whole(case, {}), dense_model(open_dense(case.dense))
        engine.prepare(model, OptimConfig())
        return differences(model, whole)
    statistics = statistics_of(load_model(case.dense), case.method, case.router)
    plan, whole = plan_of(case, statistics), made_whole(case, statistics)
    model = moe_model(plan)
    engine.shard_for_eval(model)
    found = differences(model, whole)
    moved = moe_model(plan, weights=DonatedWeights(model.module))
    train_module = engine.prepare(moved, OptimConfig())
    found += [f"moved: {line}" for line in differences(moved, whole)]
    full_names = {name for name, _ in train_module.full_tensors()}
    return found + [f"{name} is not saved" for name in full_names ^ set(state(whole.module))]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)}


def compare_all(cases: dict[str, Case]) -> dict[str, list[str]]:
    """The differences of every case."""
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        try:
            found[name] = compare(case)
        except Exception as error:
            raise AssertionError(f"case {name}") from error
    return found


def with_all_layers(config: UpcycleConfig, sources: list[str]) -> UpcycleConfig:
    """A config for a host of three blocks, its sources real ones."""
    if getattr(config, "sources", None):
        config = replace(config, sources=sources[: len(config.sources)])  # type: ignore[call-arg]
    return replace(config, layers="all")
