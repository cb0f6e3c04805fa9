"""Specs of the comparison: a choice of ``conf/router`` with its options, or one dense network.

Written ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``: ``comet:entropy_coef=1,balance_coef=0.1``. A list as a
value may hold commas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe.errors import ConfigError, Mistake, UserError
from moe.routers.configs.hash_config import HashConfig
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.studies.option_lists import conf_choices, split_list
from recipes.studies.tables.table_model import ModelConfig, TableMoE

#: Not a router: one network as wide as the experts of a row.
DENSE = "dense"
#: Share of a run's steps in which a permutation is searched for; COMET's runs have 1% to 10%.
_SEARCH_SHARE = 0.05


def parse_moes(specs: Sequence[str], config: ModelConfig, steps: int) -> dict[str, TableMoE]:
    """Parses the specs; the result has their texts as keys.

    Args:
        specs: Specs of the command line.
        config: E, K and F.
        steps: Optimizer steps of a run, which the search of a permutation is a share of.

    Raises:
        UserError: Some specs cannot be used; all mistakes at once.
    """
    moes: dict[str, TableMoE] = {}
    mistakes: list[Mistake] = []
    if not specs:
        mistakes.append(Mistake("--routers", "", "the list is empty", "Name at least one router."))
    for spec in specs:
        try:
            moes[spec] = _parse(spec, config, steps)
        except UserError as error:
            mistakes += [dataclasses.replace(m, path=f"--routers {spec}: {m.path}") for m in error.mistakes]
    if mistakes:
        raise ConfigError(mistakes)
    return moes


def _parse(spec: str, config: ModelConfig, steps: int) -> TableMoE:
    name, _, tail = spec.partition(":")
    options = split_list(tail)
    if name == DENSE:
        if options:
            raise ConfigError.one("options", tail, "a dense network has none", f"Write {DENSE}.")
        return TableMoE(HashConfig(top_k=1), 1, config.top_k * config.expert_width)
    known = conf_choices("router")
    if name not in known:
        remedy = f"Choose from: {', '.join([DENSE, *known])}."
        raise ConfigError.one("router", name, "there is no such router", remedy)
    own = [f"router.{option}" for option in options]
    values = compose_config(["+recipe=upcycle", f"router={name}", *own])
    given = {option.partition("=")[0] for option in options}
    _fill(values["router"], config.top_k, steps, given, "")
    router = parse_config(values).router
    wrong = router.check(config.num_experts)
    if wrong:
        raise ConfigError([dataclasses.replace(wrong, path="router", value=name)])
    return TableMoE(router, config.num_experts, config.expert_width)


def _fill(values: dict[str, Any], top_k: int, steps: int, given: set[str], prefix: str) -> None:
    """Sets K, and the steps of a search, where a router has them and the spec does not set them."""
    if "top_k" in values and f"{prefix}top_k" not in given:
        values["top_k"] = top_k
    if isinstance(values.get("inner"), dict):
        _fill(values["inner"], top_k, steps, given, f"{prefix}inner.")
    if isinstance(values.get("search"), dict) and f"{prefix}search.steps" not in given:
        values["search"]["steps"] = max(1, round(_SEARCH_SHARE * steps))
