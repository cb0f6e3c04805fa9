"""Options of attention experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import FieldError, Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import Config
from moe.upcycle.layer_choice import LayerChoice, parse_layers


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Config of `moe.attention.routed_attention.AttentionMoE` in the layers of a dense model."""

    router: RouterConfig
    """Router over the key-value heads, of which ``router.top_k`` attend for each token."""
    name: Literal["moe"] = "moe"
    layers: str | list[int] = "all"
    """Layers whose attention is cut into experts, in the forms of ``upcycle.layers``."""
    scale_factor: float | None = None
    """Factor on the router's weights. None makes an expert weigh 1 on average, as in the dense attention: K
    if weights sum to 1, and 1 if each is 1."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "heads that count nothing cannot learn",
                "Set it above 0.",
            ),
        )
        parse_layers(self.layers)

    @property
    def layer_choice(self) -> LayerChoice:
        """The parsed `layers`."""
        return parse_layers(self.layers)

    def check(self, num_experts: int, num_layers: int) -> list[Mistake]:
        """Returns why a model's attention cannot become such experts, as its sizes tell; empty if it can.

        Args:
            num_experts: Key-value heads.
            num_layers: Layers of the model.
        """
        mistakes = []
        top_k = self.router.experts_per_token
        if top_k > num_experts:
            rule = f"the model has {num_experts} key-value heads"
            mistakes.append(Mistake("attention.router.top_k", top_k, rule, f"Set {num_experts} or less."))
        elif (found := self.router.check(num_experts)) is not None:
            mistakes.append(found.under("attention.router"))
        try:
            self.layer_choice.pick(num_layers)
        except FieldError as error:
            mistakes += error.under("attention").mistakes
        return mistakes
