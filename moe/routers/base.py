"""What every router is.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from torch import Generator, Tensor, nn

from moe.errors import Mistake
from moe.types import Config, LayerContext, Routing


@dataclass(frozen=True)
class RouterConfig(Config):
    """What every router's config holds: its name, which picks the class."""

    name: str
    """The router's name, as in ``conf/router/NAME.yaml``."""


if TYPE_CHECKING:
    from moe.dispatch.base import Dispatcher
    from moe.experts.experts import Experts

ConfigT = TypeVar("ConfigT", bound=RouterConfig)


class Router(nn.Module, ABC, Generic[ConfigT]):
    """Decides for each token which experts it goes to and with what weight.

    A subclass sets `name` and `config_class` and is found by being a module of `moe.routers`.

    Attributes:
        name: The value of ``router.name`` that picks this class.
        config_class: The typed config it is built from.
        parameter_role: Tells the optimizer which parameter group these parameters are in.
        is_causal: Whether in evaluation no token's routing depends on a later token. What is not causal
            cannot generate the text that it was trained on: use it for encoders and diffusion.
        varies_top_k: Whether K may change between steps: whether it routes by `LayerContext.top_k`.
        mixes_tokens: Whether experts see mixtures of tokens: what a routing says of tokens is then not how
            much the experts compute.
        host_syncs: Why the host waits for a GPU in a training pass, and how often; None where it never does.
        compile_unsupported_reason: Why ``torch.compile(router, fullgraph=True)`` cannot hold the training
            passes of all steps in one graph, and what to do; None where it can.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[RouterConfig]]
    parameter_role: ClassVar[str] = "router"
    is_causal: ClassVar[bool] = True
    varies_top_k: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False
    host_syncs: ClassVar[str | None] = None
    compile_unsupported_reason: ClassVar[str | None] = None

    def __init__(self, config: ConfigT, model_width: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.model_width = model_width
        self.num_experts = num_experts

    @classmethod
    def check(cls, config: ConfigT, num_experts: int) -> Mistake | None:
        """Returns the mistake that keeps this config from routing over E experts; None when it can.

        The path is relative to the router's config.
        """
        top_k = getattr(config, "top_k", 0)
        if top_k <= num_experts:
            return None
        rule = f"a token cannot use more experts than the {num_experts} of upcycle.num_experts"
        remedy = f"Set router.top_k to {num_experts} or less, or raise upcycle.num_experts."
        return Mistake("top_k", top_k, rule, remedy)

    @classmethod
    def needed_keys(cls, config: ConfigT) -> frozenset[str]:
        """The keys of `RouterContext.keys` that it cannot route without."""
        return frozenset()

    @classmethod
    def reads_experts(cls, config: ConfigT) -> bool:
        """Whether it routes by the weights of all experts, which then must all be on every rank."""
        return False

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Experts that a token uses (the mean, where it varies): what active parameters are counted by.

        With a schedule of K (`moe.routing.top_k_schedule`) those that it uses in the end.
        """

    @property
    @abstractmethod
    def weights_sum_to_one(self) -> bool:
        """Whether the combine weights of every token sum to 1, so that copied experts are exact."""

    @property
    def weighs_one(self) -> bool:
        """Whether every chosen expert weighs exactly 1, as long as training has not changed the router."""
        return False

    @abstractmethod
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the initial parameters, from the generator when there is one."""

    @abstractmethod
    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes T tokens of width D."""

    def attach(self, experts: Experts) -> None:
        """Told once which experts it routes to; for routers that read the experts' own weights."""
        return

    def rows_ED(self) -> Tensor | None:
        """The parameter with one row for each expert, which upcycling may set; None when there is none."""
        return None

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """The dispatcher of its layer; for routers whose experts see something else than single tokens."""
        return dispatcher

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Changes what changes between steps (biases, temperatures); never done in forward."""
        return
