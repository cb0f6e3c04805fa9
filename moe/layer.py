"""MoE layer in the place of a dense feed-forward network: route, dispatch, compute, combine.

Letters: T tokens, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moe.dispatch.base import Dispatcher
from moe.experts.shared import SharedExpert
from moe.metrics import LayerStats
from moe.routers.base import Router
from moe.routing.balance import attach_loss
from moe.types import LayerContext

if TYPE_CHECKING:
    from moe.experts.experts import Experts


class MoELayer(nn.Module):
    """Mixture-of-experts layer, ``[..., D] -> [..., D]``, which only sequences its parts.

    Attributes:
        shared: The expert that every token uses in addition; None without one.
        context: This layer's view of the run; the model fills it.
        stats: Routing statistics of the current step.
    """

    def __init__(
        self,
        router: Router[Any],
        dispatcher: Dispatcher,
        experts: Experts,
        context: LayerContext,
        shared: SharedExpert | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.stats = LayerStats()
        self.set_dispatcher(dispatcher)
        self.experts = experts
        self.shared = shared
        router.attach(experts)
        self.context = context

    def set_dispatcher(self, dispatcher: Dispatcher) -> None:
        """Sets the dispatcher, e.g. to all-to-all when experts are sharded over ranks."""
        self.stats.readers = dispatcher.group
        self.dispatcher = self.router.wrap_dispatcher(dispatcher)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the tokens through their experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, self.context)
        handle = self.dispatcher.start(x_TD, routing)
        # Computation that needs no expert overlaps with the transfer.
        shared_TD = None if self.shared is None else self.shared(x_TD)
        run = self.context.run
        if self.training:
            self.stats.record(run.micro_batch, routing, self.context.token_mask_T(len(x_TD)))
        sent = handle.wait()
        out_TD = self.dispatcher.combine(self.experts(sent), sent)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        if self.training:
            for loss in routing.losses.values():
                out_TD = attach_loss(out_TD, loss, run.loss_scale)
        return out_TD.reshape(x.shape)


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Returns every MoE layer of a model with its module name, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
