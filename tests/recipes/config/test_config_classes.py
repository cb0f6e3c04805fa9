"""Options are read from config classes that stand apart from the classes that they configure."""

from __future__ import annotations

from moe.routers import router_classes
from moe.upcycle import upcycle_methods
from recipes.config.schema import config_classes
from recipes.engines import engine_classes


def test_every_plug_in_has_its_config_among_those_that_are_read_without_torch() -> None:
    families = {"router": router_classes(), "upcycle": upcycle_methods(), "engine": engine_classes()}
    for section, classes in families.items():
        own = {name: cls.config_class for name, cls in classes.items()}
        assert own == dict(config_classes()[section]), section
