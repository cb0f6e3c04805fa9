"""Discovery of the classes of a package by their base class: adding one means adding a file."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any


def discover(package: str, base: Any, module: str = "{name}", ending: str = "") -> dict[str, Any]:
    """Returns the concrete subclasses of `base` in the modules of a package, by their ``name`` attribute.

    Config dataclasses whose field ``name`` has no default are bases of others, and left out.

    Args:
        package: Dotted name of an imported package; its direct modules are imported.
        base: The (abstract) class that they derive from; callers annotate the result.
        module: Place of the module for the entry ``{name}`` of the package, e.g. ``{name}.{name}_engine`` if
            each entry is a package; entries without such a module are skipped.
        ending: End of the names of entries; others are skipped.

    Returns:
        Name to class, in alphabetical order.
    """
    return dict(_discover(package, base, module, ending, tuple(importlib.import_module(package).__path__)))


@functools.cache
def _discover(package: str, base: Any, module: str, ending: str, path: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    entries = (info for info in pkgutil.iter_modules(path) if info.name.endswith(ending))
    for info in sorted(entries, key=lambda info: info.name):
        place = f"{package}.{module.format(name=info.name)}"
        if "." in module and (not info.ispkg or importlib.util.find_spec(place) is None):
            continue
        loaded = importlib.import_module(place)
        for value in vars(loaded).values():
            own = inspect.isclass(value) and value.__module__ == loaded.__name__
            if not own or not issubclass(value, base) or _is_base_config(value):
                continue
            missing = sorted(getattr(value, "__abstractmethods__", ()))
            # Who has a name wants to be found: left out, it would be "no such ...".
            assert not missing or "name" not in vars(value), f"{value} does not define {', '.join(missing)}"
            if not missing:
                name: str = value.name
                assert name not in found, f"{value} and {found.get(name)} share the name {name!r}"
                found[name] = value
    return dict(sorted(found.items()))


def _is_base_config(cls: type) -> bool:
    """Returns True for config dataclasses whose field ``name`` has no default: others derive from them."""
    return dataclasses.is_dataclass(cls) and not hasattr(cls, "name")
