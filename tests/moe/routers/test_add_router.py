"""Runs docs/add_router.md: its files as they stand, and the mistakes that it foretells."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import yaml

import moe.routers
from moe.routers import router_classes
from tests.grid import Axis, Grid
from tests.moe.routers import (
    test_moe_routers,
    test_moe_routers_gradients,
    test_moe_routers_invariance,
    test_moe_routers_state,
)
from tests.moe.routers.routing_cases import label, router_case
from tests.paths import ROOT

CONTRACT = (
    test_moe_routers,
    test_moe_routers_state,
    test_moe_routers_invariance,
    test_moe_routers_gradients,
)
PAGE = (ROOT / "docs/add_router.md").read_text(encoding="utf-8")


def files_of_the_page() -> dict[str, str]:
    """Path -> text, of every section whose heading names a file."""
    sections = re.findall(r"^## [^\n]*`([\w/.]+)`\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    found = {path: re.search(r"```\w+\n(.*?)```", text, re.DOTALL) for path, text in sections}
    return {path: block[1] for path, block in found.items() if block is not None}


FILES = files_of_the_page()
CONFIG, ROUTER, VALUES, CASE, OWN_TEST = FILES.values()


def load(monkeypatch: pytest.MonkeyPatch, path: str, text: str) -> ModuleType:
    """Makes a module of a text, found under the name that the file would have."""
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, path, "exec"), vars(module))
    return module


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Holds a text of the router to the contract, with the page's case."""
    places = list(FILES)

    def hold(router: str) -> None:
        config = load(monkeypatch, places[0], CONFIG)
        module = load(monkeypatch, places[1], router)
        known = router_classes() | {"mine": module.MineRouter}
        monkeypatch.setattr(moe.routers, "router_classes", lambda: known)
        load(monkeypatch, places[3], CASE)
        configs = [config.MineConfig(), *router_case("mine").variants]
        for tests in CONTRACT:
            for test in vars(tests).values():
                if isinstance(grid := getattr(test, "grid", None), Grid):
                    _run(grid, configs)

    yield hold


def _run(grid: Grid, configs: list[Any]) -> None:
    """Runs a contract test that goes over configs for those of one router."""
    if ["config"] not in [axis.names for axis in grid.axes]:
        return
    mine = Axis(["config"], [(config,) for config in configs], [label(config) for config in configs])
    axes = [mine if axis.names == ["config"] else axis for axis in grid.axes]
    for _, given in Grid(inspect.unwrap(grid.test), axes).cases():
        try:
            grid.test(**given)
        except pytest.skip.Exception:
            continue


def test_the_page_has_five_files() -> None:
    assert list(FILES) == [
        "moe/routers/configs/mine_config.py",
        "moe/routers/mine.py",
        "conf/router/mine.yaml",
        "tests/moe/routers/router_cases/mine.py",
        "tests/moe/routers/test_router_mine.py",
    ]


def test_the_router_keeps_the_contract(contract: Any) -> None:
    contract(ROUTER)


def test_its_values_are_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    config_class = load(monkeypatch, "moe/routers/configs/mine_config.py", CONFIG).MineConfig
    values: Mapping[str, Any] = yaml.safe_load(VALUES)
    assert set(values) == {field.name for field in dataclasses.fields(config_class)}
    assert config_class(**values) == config_class()


def test_its_own_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "moe/routers/configs/mine_config.py", CONFIG)
    load(monkeypatch, "moe/routers/mine.py", ROUTER)
    own = load(monkeypatch, "tests/moe/routers/test_router_mine.py", OWN_TEST)
    ran = [test() for name, test in vars(own).items() if name.startswith("test_")]
    assert ran == [None]


LOSSES = "losses = self.balance_losses(logits_TE, probs_TE, ids_TK, ctx)"
BROKEN = {
    "names": ("bias_E", "bias", "the end of a tensor's name tells its axes, E for experts: bias (7,)"),
    "autocast": (
        "with torch.autocast(x_TD.device.type, enabled=False):",
        "if True:",
        "fp32 under autocast: ",
    ),
    "losses": (LOSSES, 'losses = {"balance": probs_TE.square().sum()}', "evaluation makes no losses: ['bal"),
    "sum": ("renormalise=True", "renormalise=False", "weights_sum_to_one is True, and a token's weights sum"),
    "untrained": ("+ self.bias_E)", "+ self.bias_E.detach())", "nothing trains bias_E"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_rule_is_named_as_the_page_says(contract: Any, mistake: str) -> None:
    right, wrong, rule = BROKEN[mistake]
    assert right in ROUTER and rule in PAGE
    with pytest.raises(AssertionError, match=re.escape(rule)):
        contract(ROUTER.replace(right, wrong))
