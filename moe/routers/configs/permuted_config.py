"""Options of `moe.routers.permuted`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe.errors import FieldError, Mistake, choose
from moe.routers import router_configs
from moe.routers.configs import RouterConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routing.permutation_config import PermutationConfig


class _ByName:
    """Marker that tells pydantic (which this library does not import) that the name picks the class."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        # Tags enter the path of an error; brackets set them apart from the names of options.
        choices = {f"[{name}]": handler.generate_schema(_wrappable(name)) for name in _wrappable_names()}
        union = {
            "type": "tagged-union",
            "discriminator": lambda value: f"[{_name_of(value)}]",
            "choices": choices,
        }
        check = {"type": "no-info", "function": _check_name}
        return {"type": "function-before", "function": check, "schema": union}


def _wrappable_names() -> list[str]:
    return sorted(router_configs().keys() - {"permuted"})


def _wrappable(name: str) -> type[RouterConfig]:
    return router_configs()[name]


def _name_of(value: Any) -> Any:
    return value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)


def _check_name(value: Any) -> Any:
    if _name_of(value) not in _wrappable_names():
        rule, name = "no router that can be permuted has this name", _name_of(value)
        raise FieldError.one("name", name, rule, choose(name, _wrappable_names()))
    return value


def _plain() -> RouterConfig:
    return TopKConfig(balance_coef=0.0)


@dataclass(frozen=True)
class PermutedConfig(RouterConfig):
    """Config of `PermutedRouter`."""

    name: Literal["permuted"] = "permuted"
    inner: Annotated[RouterConfig, _ByName()] = field(default_factory=_plain)
    """Config of the router that chooses. Its name picks the class, into which a mapping is read.
    The default is top-k routing without losses."""
    search: PermutationConfig = field(default_factory=PermutationConfig)
    """Options of the search. Its length depends on the run, so the default does not search."""

    def __post_init__(self) -> None:
        # A config that was written as json comes back as mappings.
        inner, search = _check_name(self.inner), self.search
        if isinstance(inner, Mapping):
            object.__setattr__(self, "inner", _wrappable(inner["name"])(**inner))
        if isinstance(search, Mapping):
            object.__setattr__(self, "search", PermutationConfig(**search))

    def check(self, num_experts: int) -> Mistake | None:
        """Applies the inner router's rules, and requires that experts see single tokens."""
        inner = self.inner
        if inner.mixes_tokens:
            rule = (
                f"{inner.name} changes what the experts see, which a permutation of weights does not follow"
            )
            return Mistake("inner.name", inner.name, rule, "Set router.inner to another router.")
        found = inner.check(num_experts)
        return None if found is None else found.under("inner")

    @property
    def experts_per_token(self) -> int:
        """The inner router's K; a token uses up to E during the search."""
        return self.inner.experts_per_token

    @property
    def needed_keys(self) -> frozenset[str]:
        """The inner router's keys."""
        return self.inner.needed_keys

    @property
    def reads_experts(self) -> bool:
        """The inner router's answer."""
        return self.inner.reads_experts
