"""What a format must know of a mixture of experts to hold it: nothing of its weights, all of its shape.

The same description is made of a trained host in memory and of a checkpoint that is converted file to file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe.attention.routed_attention import attention_layers
from moe.layer import MoELayer
from moe.routers import Router
from moe.upcycle.layer_plan import FFNShape
from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class MoESpec:
    """One MoE layer.

    Attributes:
        index: Of its block.
        site: Module path of the feed-forward network that it takes the place of.
        router: Its router; of its tensors only names and shapes matter here.
        num_experts: Routed experts.
        expert: Shape of a routed expert.
        shared_width: Width of the expert that every token uses; 0 for none.
    """

    index: int
    site: str
    router: Router[Any]
    num_experts: int
    expert: FFNShape
    shared_width: int = 0


@dataclass(frozen=True)
class AttentionSpec:
    """One layer of attention experts.

    Attributes:
        index: Of its block.
        site: Module path of the attention that it takes the place of.
        router: Its router.
        scale: What the router's weights are multiplied by.
    """

    index: int
    site: str
    router: Router[Any]
    scale: float


@dataclass(frozen=True)
class ModelSpec:
    """A decoder some of whose feed-forward networks, and of whose attention, are mixtures.

    Attributes:
        config: Of the dense host (transformers').
        architecture: Name of the host's class.
        moe_blocks: In the order of their blocks.
        attention: Those of attention experts.
    """

    config: Any
    architecture: str
    moe_blocks: tuple[MoESpec, ...]
    attention: tuple[AttentionSpec, ...] = ()

    @property
    def num_layers(self) -> int:
        """Blocks, mixtures or not."""
        return int(self.config.num_hidden_layers)

    @property
    def dense_layers(self) -> list[int]:
        """Indices of the blocks that stayed dense."""
        return sorted(set(range(self.num_layers)) - {moe.index for moe in self.moe_blocks})


def describe_model(model: HFModel) -> ModelSpec:
    """The description of a host in memory."""
    named = {id(layer): name for name, layer in model.module.named_modules() if isinstance(layer, MoELayer)}
    moe_blocks = tuple(_describe(index, named[id(layer)], layer) for index, layer in model.moe_layers())
    attention = tuple(
        AttentionSpec(layer.context.layer_index, name, layer.router, layer.scale)
        for name, layer in attention_layers(model.module)
    )
    return ModelSpec(model.config, type(model.module).__name__, moe_blocks, attention)


def _describe(index: int, site: str, layer: MoELayer) -> MoESpec:
    experts = layer.experts
    E, D, F = experts.w_down_EDF.shape
    shape = FFNShape(
        width=F,
        model_width=D,
        gated=experts.gated,
        activation=experts.activation,
        up_bias=experts.b_up_EU is not None,
        down_bias=experts.b_down_ED is not None,
    )
    shared_width = 0 if layer.shared is None else layer.shared.w_down_DF.shape[1]
    return MoESpec(index, site, layer.router, E, shape, shared_width)
