"""Shape of an MoE model, without its weights, as export formats need it.

It is made from a trained model in memory and from a checkpoint that is converted file to file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule
from torch.nn import Module

from moe.attention.routed_attention import attention_layers
from moe.layer import MoELayer
from moe.upcycle.dense_shape import FFNShape
from recipes.models.hf.declared_config import DeclaredConfig

if TYPE_CHECKING:
    from moe.routers.base import Router
    from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class MoESpec:
    """Shape of one MoE layer.

    Attributes:
        index: Index of its block.
        site: Module path of the feed-forward network that it replaces.
        router: Its router; only names and shapes of its tensors are used.
        num_experts: Number of routed experts.
        expert: Shape of a routed expert.
        shared_width: Width of the shared expert; 0 for none.
        shared_gate: Whether a row of its own scales the shared expert's output.
    """

    index: int
    site: str
    router: Router[Any]
    num_experts: int
    expert: FFNShape
    shared_width: int = 0
    shared_gate: bool = False

    @property
    def shared_gate_name(self) -> str:
        """Name of that row in the model, where it counts as a tensor outside the experts."""
        return f"{self.site}.shared.gate_1D"


@dataclass(frozen=True)
class AttentionSpec:
    """Shape of one layer of attention experts.

    Attributes:
        index: Index of its block.
        site: Module path of the attention that it replaces.
        router: Its router.
        scale: Factor of the router's weights.
    """

    index: int
    site: str
    router: Router[Any]
    scale: float


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder with MoE layers, and possibly attention experts.

    Attributes:
        config: transformers' config of the dense model.
        architecture: Name of the dense model's class.
        moe_blocks: MoE layers in the order of their blocks.
        attention: Layers of attention experts.
    """

    config: Any
    architecture: str
    moe_blocks: tuple[MoESpec, ...]
    attention: tuple[AttentionSpec, ...] = ()

    @property
    def read(self) -> Any:
        """The config with the keys alone that the dense model's class reads, as formats must take it."""
        return DeclaredConfig(self.config)

    @property
    def num_layers(self) -> int:
        """Number of blocks, with or without an MoE layer."""
        return int(self.config.num_hidden_layers)

    @property
    def dense_layers(self) -> list[int]:
        """Indices of the blocks whose feed-forward networks are dense."""
        return sorted(set(range(self.num_layers)) - {moe.index for moe in self.moe_blocks})


def describe_model(model: HFModel) -> ModelSpec:
    """Describes a model in memory."""
    named = {id(layer): name for name, layer in model.module.named_modules() if isinstance(layer, MoELayer)}
    moe_blocks = tuple(_describe(index, named[id(layer)], layer) for index, layer in model.moe_layers())
    attention = tuple(
        AttentionSpec(layer.context.layer_index, name, layer.router, layer.scale)
        for name, layer in attention_layers(model.module)
    )
    return ModelSpec(model.config, _architecture(model.module), moe_blocks, attention)


def _architecture(module: Module) -> str:
    """Returns the name of the model's class; FSDP2 puts a class of its own, with another name, before it."""
    return next(cls.__name__ for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


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
    gated = layer.shared is not None and layer.shared.gate_1D is not None
    return MoESpec(index, site, layer.router, E, shape, shared_width, gated)
