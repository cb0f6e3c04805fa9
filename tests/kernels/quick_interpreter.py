"""Quickens Triton's interpreter: it works out at each step what it worked out at the step before."""

from __future__ import annotations

import inspect
import math
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_builtins: dict[Any, list[str]] = {}
_dtypes: dict[str, Any] = {}
_languages: dict[Any, list[Any]] = {}
_block_types: dict[tuple[Any, ...], Any] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
_look_up = interpreter._get_np_dtype
_initialise = core.block_type.__init__
_unwrap = core._unwrap_if_constexpr
_equal = core.dtype.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl


def install() -> None:
    """Puts quicker functions in the places of those of the interpreter and its language."""
    interpreter._patch_builtin = _patch_known
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _numpy_dtype
    core.block_type.__new__ = _block_type
    core.block_type.__init__ = _keep
    core.tensor.__init__ = _tensor
    core.dtype.__eq__ = _same_type
    core._unwrap_if_constexpr = _value
    TritonSemantic.broadcast_impl_value = _same_shape
    TritonSemantic.binary_op_sanitize_overflow_impl = _overflow_check


def _patch_known(package: Any, builder: Any, scope: Any) -> None:
    """Does what `interpreter._patch_builtin` does, and looks for the names once."""
    if package not in _builtins:
        _builtins[package] = [name for name, one in inspect.getmembers(package) if core.is_builtin(one)]
    for name in _builtins[package]:
        member = getattr(package, name)
        # Where one function calls another, they are in their places already.
        if core.is_builtin(member):
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
    if type(kind) is not core.dtype:
        return _look_up(kind)
    if kind.name not in _dtypes:
        _dtypes[kind.name] = _look_up(kind)
    return _dtypes[kind.name]


def _block_type(cls: type, element_ty: Any, shape: Any) -> Any:
    """Returns the one type of blocks of these elements and this shape, instead of a new one."""
    sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
    # The type that is kept holds the type of its elements: the number stays that of this object.
    key = (id(element_ty), sizes)
    if key not in _block_types:
        made = object.__new__(cls)
        _initialise(made, element_ty, shape)
        _block_types[key] = made
    return _block_types[key]


def _keep(self: Any, element_ty: Any, shape: Any) -> None:
    """Leaves a type of blocks as it was made."""


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """Does what `tensor.__init__` does, and makes the constants of a shape once."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in _shapes:
        wrapped = core.tuple([core.constexpr(size) for size in sizes])
        _shapes[sizes] = (wrapped, core.constexpr(math.prod(sizes)))
    self.shape, self.numel = _shapes[sizes]


def _same_type(self: Any, other: Any) -> bool:
    """Does what `dtype.__eq__` does, and sees at once that a type is itself."""
    return self is other or _equal(self, other)


def _value(given: Any) -> Any:
    """Does what `_unwrap_if_constexpr` does, and asks first for what is most frequent."""
    kind = type(given)
    if kind is core.constexpr:
        return given.value
    return given if kind is core.tensor or kind is int else _unwrap(given)


def _same_shape(self: Any, lhs: Any, rhs: Any) -> Any:
    """Does what `broadcast_impl_value` does; shapes that are equal are one object since `_tensor`."""
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(self, lhs, rhs)


def _overflow_check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Does what the original does, which computes a condition even where the option ``debug`` is off."""
    if self.builder.options.debug:
        _check_overflow(self, lhs, rhs, binary_op)
