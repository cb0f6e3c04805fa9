"""Reference of the options, read from the docstrings and defaults of the schema.

``python -m recipes.config.reference > docs/options.md`` writes the page anew.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from moe.errors import ConfigError, choose
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, config_classes
from recipes.config.search_path import CONF
from recipes.config.sections import section_classes
from recipes.runtime.source_root import SOURCE_ROOT

# Where the modules of a group's choices stand, whose first line says what the choice is.
_MODULES = {
    "router": "moe/routers/{0}.py",
    "upcycle": "moe/upcycle/{0}.py",
    "engine": "recipes/engines/{0}/{0}_engine.py",
}
_HEAD = """\
# Options

Made from the schema by `python -m recipes.config.reference > docs/options.md`. `train.py --help PATH` prints
an entry, `train.py --list GROUP` the choices of a group. A default is the value in a run of `+recipe=upcycle`
without further options, or with the choice that the heading names: what the files in `conf/` set.
"""


@dataclass(frozen=True)
class Option:
    """Option of a run.

    Attributes:
        path: Its path, as in ``train.steps``.
        type: Its type, or the values that it may have.
        default: Its default, as on the command line; None where it must be set.
        text: What it means.
        choice: The choice of its group that has it, e.g. ``topk``; empty where every run has it.
    """

    path: str
    type: str
    default: str | None
    text: str
    choice: str = ""

    def __str__(self) -> str:
        default = "required" if self.default is None else f"default {self.default}"
        where = f" (of {self.path.partition('.')[0]}={self.choice})" if self.choice else ""
        return f"{self.path}{where}: {self.type}, {default}. {self.text}".rstrip()

    @property
    def line(self) -> str:
        """Its line of the page."""
        default = "required" if self.default is None else f"default `{self.default}`"
        return f"- `{self.path}`: `{self.type}`, {default}. {self.text}".rstrip()


@functools.cache
def all_options() -> tuple[Option, ...]:
    """Returns every option, in the order of the schema."""
    values = compose_config(["+recipe=upcycle"])
    found = []
    families = config_classes()
    for field in dataclasses.fields(RunConfig):
        if field.name in families:
            for choice, cls in families[field.name].items():
                found += _options(cls, field.name, _values_of(field.name, choice), choice)
        elif field.name == "sections":
            for name, cls in section_classes().items():
                found += _options(cls, name, values.get(name, {}), "")
        else:
            found += _field_options(RunConfig, field, field.name, values, "")
    return tuple(found)


def _values_of(group: str, choice: str) -> dict[str, Any]:
    """Returns what the file of a choice sets; every class of a family has a file of its name."""
    values: dict[str, Any] = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8"))
    return values


def answer(topics: Sequence[str]) -> str:
    """Returns what ``--help TOPIC ...`` prints: the options of a path, or of all below it.

    Raises:
        ConfigError: There is no such option.
    """
    lines = []
    for topic in topics:
        path = topic.lstrip("+").partition("=")[0]
        own = [o for o in all_options() if o.path == path or o.path.startswith(f"{path}.")]
        if not own and not (CONF / path).is_dir():
            near = difflib.get_close_matches(path, [o.path for o in all_options()], n=1)
            remedy = f"Did you mean {near[0]}?" if near else "docs/options.md has them all."
            raise ConfigError.one("--help", topic, "there is no such option", remedy)
        lines += [str(option) for option in own]
        if (CONF / path).is_dir():
            lines += [f"choices of {path}:", *choices(path)]
    return "\n".join(lines)


def choices(group: str) -> list[str]:
    """Returns a line for each choice of a group, or for each group where none is named.

    Raises:
        ConfigError: There is no such group.
    """
    groups = {path.name: sorted(path.glob("*.yaml")) for path in sorted(CONF.iterdir()) if path.is_dir()}
    groups = {name: files for name, files in groups.items() if files and name != "section"}
    if not group:
        return [f"  {name}: {', '.join(file.stem for file in files)}" for name, files in groups.items()]
    if group not in groups:
        raise ConfigError.one("--list", group, "there is no such group", choose(group, groups))
    return [f"  {file.stem:<18}{_summary(group, file.stem)}".rstrip() for file in groups[group]]


def page() -> str:
    """Returns the text of ``docs/options.md``."""
    parts, title = [_HEAD], ""
    for option in all_options():
        section = option.path.partition(".")[0] if "." in option.path else "run as a whole"
        heading = f"{section}={option.choice}" if option.choice else section
        if heading != title:
            parts.append(f"\n## {heading}\n")
            title = heading
        parts.append(option.line)
    return "\n".join(parts) + "\n"


def _options(cls: Any, prefix: str, values: Mapping[str, Any], choice: str) -> Iterator[Option]:
    for field in dataclasses.fields(cls):
        if field.name != "name" or not choice:  # the name is the choice
            yield from _field_options(cls, field, f"{prefix}.{field.name}", values, choice)


def _field_options(
    cls: Any, field: Any, path: str, values: Mapping[str, Any], choice: str
) -> Iterator[Option]:
    hint = _hints(cls)[field.name]
    inner = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
    # A router inside another is chosen by its name: its options stand under router.
    if inner is not None and not path.endswith((".inner", "attention", "top_k_schedule", ".blend")):
        own = values.get(field.name)
        yield from _options(inner, path, own if isinstance(own, dict) else {}, choice)
        return
    text = " ".join(_texts(cls).get(field.name, "").replace("``", "`").split())
    yield Option(path, _type(field.type, hint), _default(field, values), text, choice)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(field: Any, values: Mapping[str, Any]) -> str | None:
    if field.name in values:
        value = values[field.name]
    elif field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        value = value.name if dataclasses.is_dataclass(value) and hasattr(value, "name") else value
    else:
        return None
    return value if isinstance(value, str) and value else json.dumps(value)


def _type(annotation: Any, hint: Any) -> str:
    """Writes an annotation as a user would: literals as the values themselves."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    text = str(annotation)
    text = re.sub(r"Annotated\[(\w+),.*\]", r"\1", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace('"', "").replace(", ", " | "), text)
    return text.replace("None", "null").replace("bool", "true | false")


@functools.cache
def _texts(cls: Any) -> dict[str, str]:
    """Returns the docstring of each field: the string behind it, or its entry under ``Attributes``."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _attributes(base.__doc__ or "") | _strings(base)
    return found


def _strings(cls: Any) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if told and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found[field.target.id] = str(after.value.value)  # type: ignore[attr-defined]
    return found


def _attributes(text: str) -> dict[str, str]:
    entries = inspect.cleandoc(text).partition("Attributes:\n")[2]
    return {m[1]: m[2] for m in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", entries, re.MULTILINE)}


def _summary(group: str, choice: str) -> str:
    """Returns a line on a choice: its file's comment, else its module's first sentence, else what it sets."""
    text = (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")
    comment = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("# ")]
    told = " ".join(line for line in comment if not line.startswith("@"))
    content = yaml.safe_load(text) or {}
    for name in (choice, _stem(group, content.get("name"))):
        file = SOURCE_ROOT / _MODULES.get(group, "-").format(name)
        if not told and file.is_file():
            told = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    told = told or ", ".join(f"{key}={value}" for key, value in content.items() if key != "defaults")
    return re.split(r"(?<=[a-z)])(?<!et al)\.(?: |$)", " ".join(told.split()))[0].rstrip(".") + "."


def _stem(group: str, name: Any) -> str:
    cls = config_classes().get(group, {}).get(name)
    return cls.__module__.rpartition(".")[2].removesuffix("_config") if cls else ""


if __name__ == "__main__":
    print(page(), end="")
