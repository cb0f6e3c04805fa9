"""A transformers decoder as the host of MoE layers: load it, swap its feed-forward networks, check it.

Attention, norms, embeddings and generation stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.attention.routed_attention import AttentionMoE, attention_layers
from moe.dispatch import Dispatcher
from moe.errors import ConfigError, FieldError, ModelError
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import FFNWeights
from moe.layer import MoELayer, moe_layers
from moe.routers import Router
from moe.routing.draws import seeded_generator
from moe.routing.top_k_schedule import TopKSchedule
from moe.types import LayerContext, RouterContext
from moe.upcycle import UpcycleMethod
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.equivalence import LayerDrift, LogitDrift, layer_drift, logit_drift, require_exact
from moe.upcycle.layer_plan import Draws
from moe.upcycle.router_start import start_rows, take_given_rows
from recipes.models.hf.branches import average, require_same
from recipes.models.hf.deferred_init import WeightSource
from recipes.models.hf.ffn_blocks import FFNSite, dense_ffn, find_ffns
from recipes.models.hf.load_entropy import load_entropies
from recipes.models.hf.method_fit import method_mistakes


@dataclass
class HFModel:
    """A decoder of transformers and what Graft needs to know of it.

    Attributes:
        module: The decoder; its feed-forward networks may have become `MoELayer`s.
        folder: The checkpoint it was loaded from.
        source_dtype: The dtype of that checkpoint's weights.
        context: The run as routers see it; filled before every forward pass.
        schedule: Of the experts a token uses; None where they stay as they are.
        weights: Where parameters that have no memory come from; None where all have some.
    """

    module: Any
    folder: Path
    source_dtype: torch.dtype
    context: RouterContext = field(default_factory=RouterContext)
    schedule: TopKSchedule | None = None
    weights: WeightSource | None = None
    _real_BS: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.module.register_forward_pre_hook(self._fill_context, with_kwargs=True)

    @property
    def config(self) -> Any:
        """The config of the decoder."""
        return self.module.config

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """Block index and MoE layer, in order."""
        return [(layer.context.layer_index, layer) for _, layer in moe_layers(self.module)]

    def attention_layers(self) -> list[tuple[int, AttentionMoE]]:
        """Block index and layer of attention experts, in order."""
        return [(layer.context.layer_index, layer) for _, layer in attention_layers(self.module)]

    def routed_layers(self) -> list[MoELayer | AttentionMoE]:
        """Every layer with a router."""
        moe_blocks: list[MoELayer | AttentionMoE] = [layer for _, layer in self.moe_layers()]
        return moe_blocks + [layer for _, layer in self.attention_layers()]

    @contextmanager
    def padded(self, real_BS: Tensor | None) -> Iterator[None]:
        """While open, forward passes take their padding from a mask, and not from the attention mask.

        Args:
            real_BS: ``[B, S]`` bool, True where a token is real; None leaves it to the attention mask.
        """
        self._real_BS = real_BS
        try:
            yield
        finally:
            self._real_BS = None

    def _fill_context(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.schedule is not None:
            self.context.top_k = self.schedule.at(self.context.step)
        self.context.token_ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask") if self._real_BS is None else self._real_BS
        self.context.padding_mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def load_model(folder: Path, *, trust_remote_code: bool = False) -> HFModel:
    """Loads a decoder in fp32 on the CPU: master weights are fp32, lower precision is the engine's.

    Raises:
        ModelError: transformers does not know the model, or the files lack some of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = "Check that the folder is complete and that this version of transformers knows the model."
        raise ModelError.one(
            "dense", str(folder), f"transformers cannot load it ({first})", remedy
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        rule = f"{len(missing)} weights are missing from its files, {missing[0]} the first"
        raise ModelError.one("dense", str(folder), rule, "Download the checkpoint again.")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        rule = (
            f"its files hold {len(unexpected)} weights that config.json has no place for, {unexpected[0]} the"
        )
        raise ModelError.one("dense", str(folder), f"{rule} first", "Give the config.json of these weights.")
    model.config.use_cache = False
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return HFModel(module=model, folder=folder, source_dtype=dtype)


@dataclass(frozen=True)
class Surgery:
    """What turns dense networks into mixtures.

    Attributes:
        method: Makes the experts.
        make_router: ``make_router(model_width, num_experts)``.
        make_dispatcher: A dispatcher for one layer.
        backend: Back end of the experts.
        seed: Of the routers' weights and the method's randomness.
    """

    method: UpcycleMethod[Any]
    make_router: Callable[[int, int], Router[Any]]
    make_dispatcher: Callable[[], Dispatcher]
    backend: str
    seed: int


@dataclass(frozen=True)
class SurgeryReport:
    """What was done and how exact it is.

    Attributes:
        method: Name of the upcycling method.
        layers: Indices of the blocks that became mixtures.
        claimed_exact: Whether the method claims to keep the function under this router.
        logits: Drift of the logits on real tokens.
        drifts: Drift of each layer on its own.
        load_entropy: Of each layer, entropy of where the tokens go over that of even load: 1 is balanced.
    """

    method: str
    layers: tuple[int, ...]
    claimed_exact: bool
    logits: LogitDrift
    drifts: tuple[LayerDrift, ...]
    load_entropy: tuple[float, ...]


def make_layer(
    ffns: Sequence[FFNWeights],
    layer: int,
    surgery: Surgery,
    context: RouterContext,
    statistics: Mapping[str, Tensor] | None = None,
) -> MoELayer:
    """The mixture that replaces one dense network.

    Args:
        ffns: The network in each of the dense models.
        layer: Index of its block.
        surgery: How.
        context: Of the host.
        statistics: What the method must be told of the layer.

    Raises:
        ConfigError: The method fits neither the router nor the network.
    """
    method = surgery.method
    router = surgery.make_router(ffns[0].model_width, method.config.num_experts)
    router.reset_parameters(seeded_generator(surgery.seed, "router", layer))
    if mistakes := method_mistakes(method, router.config, ffn_shape(ffns[0])):
        raise ConfigError(mistakes)
    missing = set(method.statistics) - set(statistics or {})
    assert not missing, f"nobody has gathered {sorted(missing)} of layer {layer} for {method.name}"
    built = method.for_router(router.config).build(ffns, Draws(surgery.seed, layer), statistics)
    start_rows(router, built.router)
    take_given_rows(router, statistics or {})
    experts = Experts(built.bank, surgery.backend)
    shared = None if built.shared is None else SharedExpert(built.shared)
    return MoELayer(router, surgery.make_dispatcher(), experts, LayerContext(context, layer), shared)


def chosen_sites(model: HFModel, method: UpcycleMethod[Any]) -> list[FFNSite]:
    """The feed-forward networks that ``upcycle.layers`` chooses.

    Raises:
        ConfigError: The choice names layers that the host does not have.
        ModelError: The host's networks cannot be told.
    """
    sites = find_ffns(model.module, model.config)
    try:
        return [sites[i] for i in method.config.layer_choice.pick(len(sites))]
    except FieldError as error:
        raise error.under("upcycle") from error


def swap(
    model: HFModel,
    surgery: Surgery,
    sources: Sequence[HFModel] = (),
    statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> list[tuple[FFNSite, MoELayer]]:
    """Puts mixtures in the place of the chosen networks; returns each with the site it took.

    Args:
        model: The dense decoder; changed in place.
        surgery: How.
        sources: The decoders of the method's own `sources`; their weights are read.
        statistics: What the method must be told of each layer, by its index.

    Raises:
        ConfigError: The method does not fit, or its sources are of other shapes.
    """
    method, found = surgery.method, statistics or {}
    assert len(sources) == len(method.sources), (len(sources), method.sources)
    require_same(model.module, [source.module for source in sources], method.sources)
    models = [chosen_sites(one, method) for one in (model, *sources)]
    # The networks themselves become experts: they are read as they are.
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
    """Turns the host into a mixture of experts and measures whether it still computes the same.

    Args:
        model: A dense decoder; changed in place.
        surgery: How.
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
    """While open, every forward pass of a mixture is compared with its dense network on the same input.

    Comparing on the spot keeps no activations, so that it works for models of any depth.
    """

    def hook(site: FFNSite) -> Callable[..., None]:
        def compare(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            drifts.append(layer_drift(site.layer, dense_ffn(args[0], site.weights), out))

        return compare

    handles = [layer.register_forward_hook(hook(site)) for site, layer in swapped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
