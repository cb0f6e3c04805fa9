"""Runs a test for every case of a grid, as one test with subtests: thousands of cases cost a few items.

``@each`` is written as ``@pytest.mark.parametrize``. A case that fails is reported as a subtest with its
id, and the others still run. ``--only TEXT`` runs the cases whose ids contain the text, and ``--first`` one
case of each grid.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Where a test notes how many cases it has run.
CASES = "cases"
_OPTIONS = {"only": "", "first": False}


@dataclass
class Axis:
    """Values that some parameters of a test take.

    Attributes:
        names: The parameters.
        values: For each case one value of every parameter.
        ids: What each case is called.
    """

    names: list[str]
    values: list[tuple[Any, ...]]
    ids: list[str]


@dataclass
class Grid:
    """A test and its axes.

    Attributes:
        test: The function that one case is given to.
        axes: The innermost first.
    """

    test: Callable[..., Any]
    axes: list[Axis] = field(default_factory=list)

    def cases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the id and the arguments of every case."""
        for places in itertools.product(*(range(len(axis.values)) for axis in self.axes)):
            given: dict[str, Any] = {}
            for axis, place in zip(self.axes, places, strict=True):
                given |= dict(zip(axis.names, axis.values[place], strict=True))
            yield "-".join(axis.ids[place] for axis, place in zip(self.axes, places, strict=True)), given


def each(
    names: str | Sequence[str], values: Iterable[Any], ids: Callable[[Any], Any] | Iterable[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorates a test that runs for each of the values; arguments as of ``pytest.mark.parametrize``."""
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    axis = _axis(listed, list(values), ids)

    def decorate(test: Callable[..., Any]) -> Callable[..., None]:
        wrapped = test if hasattr(test, "grid") else _wrap(test)
        grid: Grid = wrapped.grid  # type: ignore[attr-defined]
        grid.axes.append(axis)
        wrapped.__signature__ = _signature(grid)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _axis(names: list[str], values: list[Any], ids: Any) -> Axis:
    rows, texts = [], []
    listed = list(ids) if ids is not None and not callable(ids) else None
    for number, value in enumerate(values):
        text = listed[number] if listed is not None else None
        if hasattr(value, "marks") and hasattr(value, "values"):  # pytest.param
            assert not value.marks, "marks belong on the test"
            text, row = text or value.id, tuple(value.values)
        else:
            row = (value,) if len(names) == 1 else tuple(value)
        assert len(row) == len(names), (names, row)
        if text is None:
            made = [ids(part) if callable(ids) else None for part in row]
            parts = zip(names, row, made, strict=True)
            text = "-".join(
                _text(name, part, number) if own is None else str(own) for name, part, own in parts
            )
        rows.append(row)
        texts.append(text)
    return Axis(names, rows, texts)


def _text(name: str, value: Any, number: int) -> str:
    if value is None or isinstance(value, (str, int, float, bool)):
        return str(value)
    return getattr(value, "__name__", None) or f"{name}{number}"


def _signature(grid: Grid) -> inspect.Signature:
    known = {name for axis in grid.axes for name in axis.names}
    signature = inspect.signature(grid.test)
    own = [p for name, p in signature.parameters.items() if name not in known]
    kind = inspect.Parameter.KEYWORD_ONLY
    fixtures = [inspect.Parameter(name, kind) for name in ("request", "subtests")]
    return inspect.Signature([*own, *(one for one in fixtures if one.name not in signature.parameters)])


def _wrap(test: Callable[..., Any]) -> Callable[..., None]:
    wanted = inspect.signature(test).parameters

    @functools.wraps(test)
    def run(*args: Any, request: Any = None, subtests: Any = None, **fixtures: Any) -> None:
        if request is None:  # one case, called by another test
            test(*args, **fixtures)
            return
        grid: Grid = run.grid  # type: ignore[attr-defined]
        if "request" in wanted:
            fixtures["request"] = request
        count, skipped = 0, []
        for name, given in grid.cases():
            if _OPTIONS["only"] and _OPTIONS["only"] not in name:
                continue
            count += 1
            try:
                _run_case(test, args, fixtures | given, count)
            except pytest.skip.Exception as reason:
                skipped.append(f"{name}: {reason}")
            except Exception:
                with subtests.test(msg=name):
                    raise
            if _OPTIONS["first"] and count > len(skipped):
                break
        request.node.user_properties.append((CASES, count))
        if len(skipped) == count:
            pytest.skip(skipped[0] if skipped else f"no case contains {_OPTIONS['only']}")

    run.grid = Grid(test)  # type: ignore[attr-defined]
    return run


def _run_case(test: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any], number: int) -> None:
    """Runs one case; what tests are given for themselves alone, cases have for themselves as well."""
    if isinstance(given.get("tmp_path"), Path):
        given["tmp_path"] = given["tmp_path"] / str(number)
        given["tmp_path"].mkdir()
    if "monkeypatch" in given:
        with given["monkeypatch"].context() as patch:
            test(*args, **given | {"monkeypatch": patch})
    else:
        test(*args, **given)


def add_options(parser: pytest.Parser) -> None:
    """Adds the options that select cases."""
    group = parser.getgroup("grids")
    group.addoption("--only", default="", help="run only the cases of grids whose ids contain this")
    group.addoption("--first", action="store_true", help="run one case of each grid")


def configure(config: pytest.Config) -> None:
    """Keeps the options."""
    _OPTIONS.update(only=config.getoption("only"), first=config.getoption("first"))


def first_cases(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Returns the first item of each parametrised test, and all others."""
    kept: dict[str, pytest.Item] = {}
    for item in items:
        kept.setdefault(item.nodeid.partition("[")[0], item)
    return list(kept.values())
