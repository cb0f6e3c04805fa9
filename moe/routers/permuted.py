"""Any router, with a learned permutation between what it chooses and the experts (COMET's local search).

Source: Ibrahim et al., COMET (KDD 2023, arXiv 2306.02824); COMET+ is this around `comet`.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from moe.dispatch.base import Dispatcher
from moe.errors import FieldError, Mistake
from moe.experts.experts import Experts
from moe.routers import router_class, router_classes
from moe.routers.base import Router, RouterConfig
from moe.routers.topk import TopKConfig
from moe.routing.dense_gates import gates_of_slots, slots_of_gates
from moe.routing.permutation import PermutationConfig, PermutationSearch
from moe.routing.token_mean import figure_mean
from moe.types import LayerContext, Routing


class _ByName:
    """Tells pydantic, which this library does not import, that a config's class is what its name picks."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        # Tags enter the path of an error; in brackets they are told from the names of options.
        choices = {f"[{name}]": handler.generate_schema(_wrappable(name)) for name in _wrappable_names()}
        union = {
            "type": "tagged-union",
            "discriminator": lambda value: f"[{_name_of(value)}]",
            "choices": choices,
        }
        check = {"type": "no-info", "function": _check_name}
        return {"type": "function-before", "function": check, "schema": union}


def _wrappable_names() -> list[str]:
    return sorted(router_classes().keys() - {PermutedRouter.name})


def _wrappable(name: str) -> type[RouterConfig]:
    return router_class(name).config_class


def _name_of(value: Any) -> Any:
    return value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)


def _check_name(value: Any) -> Any:
    if _name_of(value) not in _wrappable_names():
        rule, remedy = "no router that can be permuted has this name", ", ".join(_wrappable_names())
        raise FieldError.one("name", _name_of(value), rule, f"Choose one of {remedy}.")
    return value


def _plain() -> RouterConfig:
    return TopKConfig(balance_coef=0.0)


@dataclass(frozen=True)
class PermutedConfig(RouterConfig):
    """Config of `PermutedRouter`."""

    name: Literal["permuted"] = "permuted"
    inner: Annotated[RouterConfig, _ByName()] = field(default_factory=_plain)
    """Config of the router that chooses; its name picks the class. A mapping is read into that class.
    The default is top-k routing without losses."""
    search: PermutationConfig = field(default_factory=PermutationConfig)
    """How the permutation is learned. How long depends on the run, so that the default does not search."""

    def __post_init__(self) -> None:
        # A config that was written as json comes back as mappings.
        inner, search = _check_name(self.inner), self.search
        if isinstance(inner, Mapping):
            object.__setattr__(self, "inner", _wrappable(inner["name"])(**inner))
        if isinstance(search, Mapping):
            object.__setattr__(self, "search", PermutationConfig(**search))


class PermutedRouter(Router[PermutedConfig]):
    """Weights ``g' = g P``: P is soft in training until the search ends, a relabelling of ids otherwise.

    Attributes:
        inner: The router that chooses.
        search: The permutation; None where there is no search, and ids stay what they are.
    """

    name = "permuted"
    config_class = PermutedConfig
    host_syncs: ClassVar[str | None] = (
        "while it searches: once whether the permutation is frozen, and once how many slots a token has. "
        "After that as the inner router"
    )

    def __init__(self, config: PermutedConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.inner: Router[Any] = router_class(config.inner.name)(config.inner, model_width, num_experts)
        self.search = PermutationSearch(config.search, num_experts) if config.search.steps else None
        if self.search is not None:
            self.search.reset_parameters()

    @classmethod
    def check(cls, config: PermutedConfig, num_experts: int) -> Mistake | None:
        """The inner router's own rules; and its experts must see single tokens."""
        inner = router_class(config.inner.name)
        if inner.wrap_dispatcher is not Router.wrap_dispatcher:
            rule = (
                f"{inner.name} changes what the experts see, which a permutation of weights does not follow"
            )
            return Mistake("inner.name", inner.name, rule, "Set router.inner to another router.")
        found = inner.check(config.inner, num_experts)
        return None if found is None else found.under("inner")

    @classmethod
    def needed_keys(cls, config: PermutedConfig) -> frozenset[str]:
        """The inner router's."""
        return router_class(config.inner.name).needed_keys(config.inner)

    @classmethod
    def reads_experts(cls, config: PermutedConfig) -> bool:
        """As the inner router."""
        return router_class(config.inner.name).reads_experts(config.inner)

    @property
    def top_k(self) -> int:
        """The inner router's; up to E during the search."""
        return self.inner.top_k

    @property
    def weights_sum_to_one(self) -> bool:
        """As the inner router's: rows of the permutation sum to 1."""
        return self.inner.weights_sum_to_one

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The inner router's own, then the permutation's."""
        self.inner.reset_parameters(generator)
        if self.search is not None:
            self.search.reset_parameters(generator)

    def attach(self, experts: Experts) -> None:
        """Passed on."""
        self.inner.attach(experts)

    def wrap_dispatcher(self, dispatcher: Dispatcher) -> Dispatcher:
        """Passed on."""
        return self.inner.wrap_dispatcher(dispatcher)

    def after_optimizer_step(self, ctx: LayerContext) -> None:
        """Passed on; then the hardened permutation is renewed."""
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
        """Relabelled ids; nothing else is computed."""
        column_E = search.column_E
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        if routing.slot_mask_TK is not None:
            ids_TK = ids_TK.masked_fill(~routing.slot_mask_TK, 0)
        if self.training:
            # Engines that wait for the gradient of every parameter get one, of zeros.
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
        """Every expert that P still gives some of a used weight to; logits have no meaning behind it."""
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
