"""Low-rank factors in a model: added beside the experts' weights, initialised, and merged on export.

Letters: E experts, r rank, I and O width in and out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.experts.experts import Experts
from moe.experts.lora import DRAWN, FACTOR_NAMES, FACTORS, drawn_factor, merged
from moe.experts.lora_config import LoraConfig
from moe.layer import moe_layers
from recipes.checkpoint.shard_layout import Placed, place
from recipes.models.export.spec import ModelSpec
from recipes.models.hf.deferred_init import WeightSource
from recipes.models.hf.hf_model import HFModel

RANK_PATH = "experts.lora.rank"


def require_rank(spec: ModelSpec, lora: LoraConfig) -> None:
    """Checks that the rank of the factors is below the width of the experts.

    Raises:
        ConfigError: The experts of a layer are narrower than the rank.
    """
    for moe in spec.moe_blocks:
        unsupported_reason = lora.unsupported_reason(moe.expert.model_width, moe.expert.width)
        if unsupported_reason is not None:
            limit = min(moe.expert.model_width, moe.expert.width)
            rule = f"{unsupported_reason} (layer {moe.index})"
            raise ConfigError.one(RANK_PATH, lora.rank, rule, f"Set {limit} or less; 8 to 64 are usual.")


def add_low_rank(model: HFModel, lora: LoraConfig, seed: int) -> None:
    """Freezes the routed experts' weights and adds trainable factors; does nothing at rank 0.

    All other weights (routers, shared experts, attention, norms, embeddings) train as before. If the model is
    deferred, each rank initialises its own part of the factors when memory is allocated.

    Args:
        model: A model with MoE layers, not yet sharded.
        lora: Config of the factors.
        seed: Seed of the run.
    """
    if not lora.rank:
        return
    for _, layer in model.moe_layers():
        layer.experts.add_low_rank(lora)
    layers = {
        f"{site}.experts.{name}": layer.context.layer_index
        for site, layer in moe_layers(model.module)
        for name in FACTOR_NAMES
    }
    if model.weights is None:
        _draw(_factors(model.module), layers, seed)
    else:
        model.weights = _WithFactors(model.weights, layers, seed)


class _WithFactors(WeightSource):
    """Weight source that adds drawn factors to another source."""

    def __init__(self, inner: WeightSource, layers: Mapping[str, int], seed: int) -> None:
        """Draws nothing yet.

        Args:
            inner: Source of all other weights.
            layers: Block index of each factor, by name.
            seed: Seed of the run.
        """
        self._inner = inner
        self._layers = layers
        self._seed = seed

    @property
    def buffers(self) -> Collection[str]:
        """See `WeightSource.buffers`."""
        return self._inner.buffers

    def fill(self, held: Mapping[str, Placed]) -> None:
        """See `WeightSource.fill`."""
        _draw({name: held[name] for name in held if is_factor(name)}, self._layers, self._seed)
        self._inner.fill({name: placed for name, placed in held.items() if not is_factor(name)})

    @torch.no_grad()
    def give(self, model: nn.Module, device: torch.device) -> None:
        """See `WeightSource.give`; the other source may hand its tensors over."""
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            for name in FACTOR_NAMES & set(experts._parameters):
                empty = experts._parameters[name]
                assert empty is not None and empty.is_meta, name
                experts._parameters[name] = nn.Parameter(torch.empty_like(empty, device=device))
        _draw(_factors(model), self._layers, self._seed)
        self._inner.give(model, device)


def _factors(model: nn.Module) -> dict[str, Placed]:
    """Places the local parts of all factors."""
    return {name: place(name, p.data) for name, p in model.named_parameters() if is_factor(name)}


@torch.no_grad()
def _draw(held: Mapping[str, Placed], layers: Mapping[str, int], seed: int) -> None:
    """Initialises the local parts of factors."""
    for path, placed in held.items():
        name, shape = path.rpartition(".")[2], (placed.shape[1], placed.shape[2])
        for piece in placed.pieces:
            piece.tensor.zero_()
            first, count = piece.box.offset[0], piece.box.size[0]
            for expert in range(first, first + count) if name in DRAWN else ():
                whole_rI = drawn_factor(seed, layers[path], name, expert, shape)
                axes = zip(piece.box.offset[1:], piece.box.size[1:], strict=True)
                rows, columns = (slice(start, start + size) for start, size in axes)
                piece.tensor[expert - first].copy_(whole_rI[rows, columns])


@dataclass(frozen=True)
class Factors:
    """Names of the factors of one stack of weights.

    Attributes:
        a: Name of A in the model.
        b: Name of B in the model.
        scale: Scale of their product.
    """

    a: str
    b: str
    scale: float


def factors_of(spec: ModelSpec, lora: LoraConfig) -> dict[str, Factors]:
    """Returns the factors of each stack of weights, by its name in the model."""
    if not lora.rank:
        return {}
    return {
        f"{moe.site}.experts.{weight}": Factors(
            f"{moe.site}.experts.{a}", f"{moe.site}.experts.{b}", lora.scale
        )
        for moe in spec.moe_blocks
        for weight, (a, b) in FACTORS.items()
    }


def model_lora(model: HFModel) -> LoraConfig:
    """Returns the config of a model's factors, which is the same in all layers."""
    return next((layer.experts.lora for _, layer in model.moe_layers()), LoraConfig())


def is_factor(name: str) -> bool:
    """Returns True if the name is that of a factor."""
    return name.rpartition(".")[2] in FACTOR_NAMES


def without_factors(
    tensors: Iterable[tuple[str, Tensor]], factors: Mapping[str, Factors], *, computes: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yields a model's tensors with factors merged into their weights, holding one layer's at a time.

    Args:
        tensors: Names and full tensors; a layer's weights and factors follow one another.
        factors: The result of `factors_of`.
        computes: Whether to merge; if False, weights are passed on unchanged.
    """
    owners = {name: weight for weight, pair in factors.items() for name in (weight, pair.a, pair.b)}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in owners or not computes:
            if name not in owners or name in factors:
                yield name, tensor
            continue
        held[name] = tensor
        weight = owners[name]
        pair = factors[weight]
        if all(part in held for part in (weight, pair.a, pair.b)):
            whole_EOI, a_ErI, b_EOr = (held.pop(part) for part in (weight, pair.a, pair.b))
            yield weight, merged(whole_EOI, a_ErI, b_EOr, pair.scale)
    assert not held, f"no factors or weights came for {sorted(held)}"
