"""What every upcycling method is: from the weights of a dense network to a bank of experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Generator

from moe.routers.base import Router
from moe.types import Config
from moe.upcycle.layers import LayerChoice, parse_layers
from moe.upcycle.weights import ExpertBank, FFNWeights


@dataclass(frozen=True)
class UpcycleConfig(Config):
    """What every method's config holds."""

    name: str
    """The method's name, as in ``conf/upcycle/NAME.yaml``."""
    num_experts: int = 8
    """Routed experts of each MoE layer."""
    layers: str | list[int] = "all"
    """Which layers become mixtures: ``all``, ``every:N`` or ``every:N:OFFSET``, ``last:N``, or a list of
    indices."""

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ValueError(
                f"num_experts={self.num_experts}: a mixture has at least two experts. Set it to 2 or more."
            )
        parse_layers(self.layers)

    @property
    def layer_choice(self) -> LayerChoice:
        """The parsed `layers`."""
        return parse_layers(self.layers)


ConfigT = TypeVar("ConfigT", bound=UpcycleConfig)


class UpcycleMethod(ABC, Generic[ConfigT]):
    """Makes a layer's experts out of its dense feed-forward network.

    A subclass sets `name` and `config_class` and is found by being a module of `moe.upcycle`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[UpcycleConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def is_exact(self, router: Router[Any]) -> bool:
        """Whether the mixture computes the same function as the dense network before training."""

    @abstractmethod
    def build(self, ffn: FFNWeights, generator: Generator) -> ExpertBank:
        """Makes the experts of one layer; randomness comes from the generator alone."""
