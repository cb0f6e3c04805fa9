"""Surgery on a whole decoder in memory, the obvious way: the reference that planned models are compared with.

Letters: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch import Dispatcher
from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import FFNWeights
from moe.layer import MoELayer
from moe.routers import router_class
from moe.routers.base import Router
from moe.routing.draws import seeded_generator
from moe.types import LayerContext, RouterContext
from moe.upcycle import upcycle_method
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.equivalence import LayerDrift, logit_drift, require_exact
from moe.upcycle.layer_plan import Draws
from moe.upcycle.router_start import start_rows, take_given_rows
from recipes.config.schema import RunConfig
from recipes.models.hf.drift import SurgeryReport, comparing
from recipes.models.hf.ffn_blocks import FFNSite, chosen_sites, dense_ffn
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.load_entropy import load_entropies


@dataclass(frozen=True)
class Surgery:
    """Recipe that turns dense networks into MoE layers.

    Attributes:
        method: Upcycling method, which makes the experts.
        make_router: ``make_router(model_width, num_experts)``.
        make_dispatcher: Makes the dispatcher of one layer.
        backend: Back end of the experts.
        seed: Seed of the routers' weights and of the method's randomness.
    """

    method: UpcycleMethod[Any]
    make_router: Callable[[int, int], Router[Any]]
    make_dispatcher: Callable[[], Dispatcher]
    backend: str
    seed: int


def make_layer(
    ffns: Sequence[FFNWeights],
    layer: int,
    surgery: Surgery,
    context: RouterContext,
    statistics: Mapping[str, Tensor] | None = None,
) -> MoELayer:
    """Builds the MoE layer that replaces one dense network.

    Args:
        ffns: The network in each of the dense models.
        layer: Index of its block.
        surgery: The recipe.
        context: The model's router context.
        statistics: Statistics of the layer that the method needs.

    Raises:
        ConfigError: The method fits neither the router nor the network.
    """
    method = surgery.method
    router = surgery.make_router(ffns[0].model_width, method.config.num_experts)
    router.reset_parameters(seeded_generator(surgery.seed, "router", layer))
    if mistakes := method.check(router.config, ffn_shape(ffns[0])):
        raise ConfigError(mistakes)
    missing = set(method.statistics) - set(statistics or {})
    assert not missing, f"no pass has gathered {sorted(missing)} of layer {layer} for {method.name}"
    built = method.for_router(router.config).build(ffns, Draws(surgery.seed, layer), statistics)
    start_rows(router, built.router)
    take_given_rows(router, statistics or {})
    experts = Experts(built.bank, surgery.backend)
    shared = None if built.shared is None else SharedExpert(built.shared)
    return MoELayer(router, surgery.make_dispatcher(), experts, LayerContext(context, layer), shared)


def swap(
    model: HFModel,
    surgery: Surgery,
    sources: Sequence[HFModel] = (),
    statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> list[tuple[FFNSite, MoELayer]]:
    """Replaces the chosen networks by MoE layers; returns each layer with its site.

    Args:
        model: The dense decoder; changed in place.
        surgery: The recipe.
        sources: The decoders of the method's own `sources`; their weights are read.
        statistics: Statistics that the method needs, by layer index.

    Raises:
        ConfigError: The method does not fit.
    """
    method, found = surgery.method, statistics or {}
    assert len(sources) == len(method.sources), (len(sources), method.sources)
    models = [chosen_sites(one, method.config) for one in (model, *sources)]
    # The networks themselves become experts, so they are not averaged.
    average(
        [one.module for one in (model, *sources)], method.averaged, [f"{site.name}." for site in models[0]]
    )
    swapped = []
    for sites in zip(*models, strict=True):
        site = sites[0]
        ffns = [one.weights for one in sites]
        layer = make_layer(ffns, site.layer, surgery, model.context, found.get(site.layer))
        site.replace(model.module, layer)
        swapped.append((site, layer))
    return swapped


@torch.no_grad()
def upcycle(
    model: HFModel,
    surgery: Surgery,
    tokens_BS: Tensor,
    sources: Sequence[HFModel] = (),
    statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> SurgeryReport:
    """Turns a dense model into an MoE model and measures whether it still computes the same.

    Args:
        model: A dense decoder; changed in place.
        surgery: The recipe.
        tokens_BS: ``[B, S]`` real tokens.
        sources: As for `swap`.
        statistics: As for `swap`.

    Raises:
        ConfigError: As `swap`.
        ExactnessError: The method claims to be exact under this router and is not.
    """
    model.module.eval()
    dense_logits = model.module(input_ids=tokens_BS).logits
    swapped = swap(model, surgery, sources, statistics)
    model.module.eval()
    drifts: list[LayerDrift] = []
    with measuring(swapped, drifts), load_entropies([layer for _, layer in swapped]) as loads:
        moe_logits = model.module(input_ids=tokens_BS).logits
    exact = all(surgery.method.is_exact(layer.router) for _, layer in swapped)
    logits = logit_drift(dense_logits, moe_logits)
    if exact:
        require_exact(surgery.method.name, logits, drifts, moe_logits.dtype)
    layers = tuple(site.layer for site, _ in swapped)
    return SurgeryReport(surgery.method.name, layers, exact, logits, tuple(drifts), tuple(loads))


@contextmanager
def measuring(swapped: list[tuple[FFNSite, MoELayer]], drifts: list[LayerDrift]) -> Iterator[None]:
    """Compares, while open, each forward pass of an MoE layer with its dense network on the same input."""
    layers = [(site.layer, layer, partial(_dense, site)) for site, layer in swapped]
    with comparing(layers, drifts):
        yield


def _dense(site: FFNSite, x_TD: Tensor) -> Tensor:
    return dense_ffn(x_TD, site.weights)


def make_surgery(config: RunConfig) -> Surgery:
    """The surgery that a config describes."""

    def make_router(model_width: int, num_experts: int) -> Router[Any]:
        return router_class(config.router.name)(config.router, model_width, num_experts)

    return Surgery(
        method=upcycle_method(config.upcycle),
        make_router=make_router,
        make_dispatcher=LocalDispatcher,
        backend=config.experts.backend,
        seed=config.seed,
    )


@torch.no_grad()
def average(models: Sequence[nn.Module], members: Sequence[int], left_out: Sequence[str]) -> None:
    """Sets the first model's parameters to the mean over several models.

    Args:
        models: Models of one architecture.
        members: Indices of the models that are averaged.
        left_out: Name prefixes of parameters that stay unchanged.
    """
    if tuple(members) == (0,):
        return
    states = [dict(models[member].named_parameters()) for member in members]
    for name, parameter in models[0].named_parameters():
        if not name.startswith(tuple(left_out)):
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))
