"""Any router, with a learned permutation between its choices and the experts (COMET's local search).

Source: Ibrahim et al., COMET (KDD 2023, arXiv 2306.02824); COMET+ is this around `comet`.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Generator, Tensor

from moe.dispatch.base import Dispatcher
from moe.experts.experts import Experts
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs.permuted_config import PermutedConfig
from moe.routing.balance import figure_mean
from moe.routing.permutation import PermutationSearch
from moe.routing.slots import gates_of_slots, slots_of_gates
from moe.types import LayerContext, Routing


class PermutedRouter(Router[PermutedConfig]):
    """Router with weights ``g' = g P``: P is soft in training until the search ends, then relabels ids.

    Attributes:
        inner: The router that chooses.
        search: The permutation; None without a search, which leaves ids unchanged.
    """

    name = "permuted"
    config_class = PermutedConfig
    host_syncs = (
        "while it searches: twice a pass, for the end of the search and the number of slots. After that like "
        "the inner router"
    )

    def create_parameters(self) -> None:
        """Creates the inner router and the search."""
        inner, search, num_experts = self.config.inner, self.config.search, self.num_experts
        self.inner: Router[Any] = router_class(inner.name)(inner, self.model_width, num_experts)
        self.search = PermutationSearch(search, num_experts) if search.steps else None

    @property
    def weights_sum_to_one(self) -> bool:
        """True if it is for the inner router: rows of the permutation sum to 1."""
        return self.inner.weights_sum_to_one

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the inner router's parameters, then the permutation's."""
        self.inner.reset_parameters(generator)
        if self.search is not None:
            self.search.reset_parameters(generator)

    def attach(self, experts: Experts) -> None:
        """Passes the experts on."""
        self.inner.attach(experts)

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """Returns the inner router's dispatcher."""
        return self.inner.wrap_dispatcher(dispatcher)

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Updates the inner router, then the hardened permutation."""
        self.inner.after_optimizer_step(ctx)
        if self.search is not None:
            self.search.advance(ctx.run.step)

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by the inner router, then permutes."""
        routing: Routing = self.inner(x_TD, ctx)
        if self.search is None:
            return routing
        if self.training and self.search.is_searching(ctx.run.step):
            with torch.autocast(x_TD.device.type, enabled=False):
                return self._soft(routing, self.search, ctx)
        return self._hard(routing, self.search)

    def _hard(self, routing: Routing, search: PermutationSearch) -> Routing:
        """Relabels the ids; nothing else is computed."""
        column_E = search.column_E
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        if routing.slot_mask_TK is not None:
            ids_TK = ids_TK.masked_fill(~routing.slot_mask_TK, 0)
        if self.training:
            # Engines wait for the gradient of every parameter; this one is zero.
            weights_TK = weights_TK + 0 * search.scores_EE.sum().to(weights_TK.dtype)
        row_E = column_E.argsort()
        return dataclasses.replace(
            routing,
            expert_ids_TK=column_E[ids_TK],
            weights_TK=weights_TK,
            scores_TE=_columns(routing.scores_TE, row_E),
            logits_TE=_columns(routing.logits_TE, row_E),
        )

    def _soft(self, routing: Routing, search: PermutationSearch, ctx: LayerContext) -> Routing:
        """Routes to every expert that P gives some used weight; logits have no meaning after that."""
        soft = search.soft(ctx.run.step)
        matrix_EE = soft.matrix_EE.to(routing.weights_TK.dtype)
        gates_TE = gates_of_slots(routing) @ matrix_EE
        if self.weights_sum_to_one:
            gates_TE = gates_TE / gates_TE.sum(-1, keepdim=True)
        ids_TK, weights_TK, used_TK = slots_of_gates(gates_TE)
        scores_TE = routing.scores_TE
        losses = dict(routing.losses)
        if self.config.search.entropy_coef:
            losses["permutation"] = (self.config.search.entropy_coef * soft.entropy).to(weights_TK.dtype)
        active = figure_mean(used_TK.sum(-1).to(weights_TK.dtype), ctx)
        largest = soft.matrix_EE.detach().amax(1).mean().to(weights_TK.dtype)
        return dataclasses.replace(
            routing,
            expert_ids_TK=ids_TK,
            weights_TK=weights_TK,
            slot_mask_TK=used_TK,
            scores_TE=None if scores_TE is None else scores_TE @ matrix_EE.to(scores_TE.dtype),
            logits_TE=None,
            losses=losses,
            metrics={**routing.metrics, "active_experts": active, "permutation_hardness": largest},
        )


def _columns(dense_TE: Tensor | None, row_E: Tensor) -> Tensor | None:
    return None if dense_TE is None else dense_TE[:, row_E]
