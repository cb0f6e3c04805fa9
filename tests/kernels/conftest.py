"""Quickens Triton's interpreter, which looks through its whole language at every call of a function."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import inspect
    from typing import Any

    from triton.language.core import dtype, is_builtin
    from triton.runtime import interpreter

    _builtins: dict[Any, list[str]] = {}
    _dtypes: dict[str, Any] = {}
    _look_up = interpreter._get_np_dtype

    def _patch_known(package: Any, builder: Any, scope: Any) -> None:
        """Does what `interpreter._patch_builtin` does, and looks for the names once."""
        if package not in _builtins:
            _builtins[package] = [name for name, one in inspect.getmembers(package) if is_builtin(one)]
        for name in _builtins[package]:
            member = getattr(package, name)
            # Where one function calls another, they are in their places already.
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def _numpy_dtype(kind: Any) -> Any:
        """Does what `interpreter._get_np_dtype` does, which makes its table for each question."""
        if type(kind) is not dtype:
            return _look_up(kind)
        if kind.name not in _dtypes:
            _dtypes[kind.name] = _look_up(kind)
        return _dtypes[kind.name]

    interpreter._patch_builtin = _patch_known
    interpreter._get_np_dtype = _numpy_dtype
