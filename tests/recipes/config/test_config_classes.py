"""Options are read from config classes that stand apart from the classes that they configure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import moe.routers
from kernels.expert_mlp import BACKENDS
from moe.errors import ConfigError
from moe.registry import declared_names
from moe.routers import router_classes
from moe.upcycle import upcycle_methods
from recipes.config.compose import compose_config
from recipes.config.schema import config_classes, parse_config
from recipes.engines import engine_classes
from tests.paths import ROOT


def test_every_plug_in_has_its_config_among_those_that_are_read_without_torch() -> None:
    families = {"router": router_classes(), "upcycle": upcycle_methods(), "engine": engine_classes()}
    for section, classes in families.items():
        own = {name: cls.config_class for name, cls in classes.items()}
        assert own == dict(config_classes()[section]), section


def test_names_in_files_are_those_of_the_classes() -> None:
    of_config: dict[str, Any] = {"beside": "config_class"}
    assert declared_names("moe.routers", **of_config) == list(router_classes())
    assert declared_names("moe.upcycle", **of_config) == list(upcycle_methods())
    assert declared_names("recipes.engines", "*/*_engine.py", **of_config) == list(engine_classes())
    assert declared_names("kernels", "*/*.py") == sorted(BACKENDS)


def _router(name: str) -> Any:
    return {**compose_config(["+recipe=upcycle"]), "router": {"name": name, "top_k": 2}}


def test_a_plug_in_of_one_file_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/add_router.md").read_text(encoding="utf-8")
    config, router = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    both = router.replace(
        "from moe.routers.configs.mine_config import MineConfig\n", config.partition("annotations\n")[2]
    )
    (tmp_path / "mine.py").write_text(both, encoding="utf-8")
    monkeypatch.setattr(moe.routers, "__path__", [*moe.routers.__path__, str(tmp_path)])
    read = parse_config(_router("mine")).router
    assert type(read).__module__ == "moe.routers.mine" and read.temperature == 1.0  # type: ignore[attr-defined]
    del sys.modules["moe.routers.mine"]
    with pytest.raises(ConfigError, match=r"'mines': no router has this name\. Did you mean mine\?"):
        parse_config(_router("mines"))
