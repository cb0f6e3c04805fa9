"""Quickens Triton's interpreter, which looks through its whole language at every call of a function."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import inspect
    from typing import Any

    import triton.language as tl
    from triton.language.core import dtype, is_builtin
    from triton.runtime import interpreter

    _builtins: dict[Any, list[str]] = {}
    _dtypes: dict[str, Any] = {}
    _languages: dict[Any, list[Any]] = {}
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

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Does what `InterpretedFunction.__call__` does, which puts the language in place at every call."""
        if self.fn not in _languages:
            _languages[self.fn] = [one for one in self.fn.__globals__.values() if one is tl or one is tl.core]
        if any(language.range.__name__ != "_new_range" for language in _languages[self.fn]):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def _numpy_dtype(kind: Any) -> Any:
        """Does what `interpreter._get_np_dtype` does, which makes its table for each question."""
        if type(kind) is not dtype:
            return _look_up(kind)
        if kind.name not in _dtypes:
            _dtypes[kind.name] = _look_up(kind)
        return _dtypes[kind.name]

    interpreter._patch_builtin = _patch_known
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _numpy_dtype
