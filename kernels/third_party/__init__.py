"""Third-party back ends: adapters for other libraries' expert kernels, discovered in this package.

Each is a `kernels.third_party.adapter.ThirdPartyBackend` in a file of its own. Without its library it rejects
every workload and says how to install the library.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from kernels.third_party.adapter import ThirdPartyBackend


def _discover() -> dict[str, ThirdPartyBackend]:
    found: dict[str, ThirdPartyBackend] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, ThirdPartyBackend) and not inspect.isabstract(value):
                assert value.name not in found, f"two adapters are called {value.name!r}"
                found[value.name] = value()
    return found


#: Adapters by the name that forces them, whether or not their library is installed.
THIRD_PARTY: Mapping[str, ThirdPartyBackend] = MappingProxyType(_discover())
