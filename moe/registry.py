"""Finds the classes of a package by what they derive from: adding one means adding a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any


def discover(package: str, base: Any, module: str = "{name}") -> dict[str, Any]:
    """Concrete subclasses of `base` in the modules of a package, by their ``name`` attribute.

    Args:
        package: Dotted name of an imported package; its direct modules are imported.
        base: The (abstract) class they derive from; callers annotate what they get.
        module: Where to look for the entry ``{name}`` of the package, e.g. ``{name}.{name}_engine`` where
            each is a package of its own; entries without such a module are passed over.

    Returns:
        Name to class, in alphabetical order.
    """
    found: dict[str, Any] = {}
    path = importlib.import_module(package).__path__
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        place = f"{package}.{module.format(name=info.name)}"
        if "." in module and (not info.ispkg or importlib.util.find_spec(place) is None):
            continue
        loaded = importlib.import_module(place)
        for value in vars(loaded).values():
            own = inspect.isclass(value) and value.__module__ == loaded.__name__
            if own and issubclass(value, base) and not inspect.isabstract(value):
                name: str = value.name
                assert name not in found, f"{value} and {found.get(name)} share the name {name!r}"
                found[name] = value
    return dict(sorted(found.items()))
