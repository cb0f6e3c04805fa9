"""Discovery of the classes of a package by their base class: adding one means adding a file."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

# ``name = "..."`` in the body of a class; a config's has a type between.
_NAME = re.compile(r"""^    name(?::[^=\n]+)? = ["']([^"'\n]+)["']$""", re.MULTILINE)


def declared_names(package: str, files: str = "*.py", beside: str = "") -> list[str]:
    """Returns the names that classes in files of a package have, without importing these files.

    They are read as text, so that a name that nobody has is known without torch. Names count that stand as
    literals, as in ``name = "topk"``.

    Args:
        package: Dotted name of a package, which is imported.
        files: Pattern of the files below its folder.
        beside: A further attribute of the classes that count.
    """
    folders = importlib.import_module(package).__path__
    texts = (file.read_text(encoding="utf-8") for folder in folders for file in Path(folder).glob(files))
    classes = (text for each in texts for text in each.split("\nclass ")[1:] if f"\n    {beside}" in text)
    return sorted({name for text in classes for name in _NAME.findall(text)})


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
