"""Contract of the routers, and the config that each begins with.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from torch import Generator, Tensor, nn

from moe.routers.configs import RouterConfig
from moe.types import LayerContext, Routing

if TYPE_CHECKING:
    from moe.dispatch.base import Dispatcher
    from moe.experts.experts import Experts

ConfigT = TypeVar("ConfigT", bound=RouterConfig)


#: `Router.host_syncs` of routers whose tokens use different numbers of experts.
COUNTS_SLOTS = "K, the number of slots, is the largest number of experts of any token: read once a pass"
#: `Router.compile_unsupported_reason` of routers that keep statistics of a step.
FILED_BY_STEP = (
    "statistics are filed by step and micro-batch, which a graph treats as constants: every new pair "
    "compiles again. Set torch._dynamo.config.allow_unspec_int_on_nn_module, or compile the experts alone"
)
#: `Router.compile_unsupported_reason` of routers that draw noise.
NOISE_KEY_ON_HOST = (
    "the key of the noise is a hash of seed, step, micro-batch and layer, which the host computes in every "
    "pass. Compile the experts alone"
)


class Router(nn.Module, ABC, Generic[ConfigT]):
    """Module that decides for each token which experts it goes to and with what weight.

    A subclass sets `name` and `config_class`; `moe.routers` finds it in whichever of its modules it stands.

    Attributes:
        name: The value of ``router.name`` that picks this class.
        config_class: The typed config that it is built from.
        parameter_role: The optimizer's parameter group for these parameters.
        is_causal: True if, in evaluation, no token's routing depends on a later token. A router that is not
            causal cannot generate text: use it for encoders and diffusion.
        host_syncs: Why, and how often, the host waits for a GPU in a training pass; None if it never does.
        compile_unsupported_reason: Why ``torch.compile(router, fullgraph=True)`` cannot hold the training
            passes of all steps in one graph, and the remedy; None if it can.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[RouterConfig]]
    parameter_role: ClassVar[str] = "router"
    is_causal: ClassVar[bool] = True
    host_syncs: ClassVar[str | None] = None
    compile_unsupported_reason: ClassVar[str | None] = None

    def __init__(self, config: ConfigT, model_width: int, num_experts: int) -> None:
        """Creates the parameters and draws them.

        Args:
            config: The router's options.
            model_width: D.
            num_experts: E.
        """
        super().__init__()
        self.config = config
        self.model_width = model_width
        self.num_experts = num_experts
        self.create_parameters()
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """Experts per token (the mean, where it varies), by which active parameters are counted.

        Under a schedule of K (`moe.routing.top_k_schedule`) the final number.
        """
        return self.config.experts_per_token

    @property
    @abstractmethod
    def weights_sum_to_one(self) -> bool:
        """True if the combine weights of every token sum to 1, so that copied experts are exact."""

    @property
    def weighs_one(self) -> bool:
        """True if every chosen expert weighs exactly 1 until training changes the router."""
        return False

    def create_parameters(self) -> None:
        """Registers parameters, buffers and submodules; `reset_parameters` gives them their values."""
        return

    @abstractmethod
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the initial parameters, from the generator if one is given."""

    @abstractmethod
    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes T tokens of width D."""

    def attach(self, experts: Experts) -> None:
        """Receives the experts that it routes to, once; for routers that read the experts' weights."""
        return

    def rows_ED(self) -> Tensor | None:
        """Returns the parameter with one row per expert, which upcycling may set; None without one."""
        return None

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """Returns the layer's dispatcher; routers whose experts do not see single tokens wrap it."""
        return dispatcher

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Updates state that moves between steps (biases, temperatures); forward never does."""
        return
