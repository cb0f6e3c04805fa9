"""The shape of the project, from its source: who imports whom, and what is nowhere to be found."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

from tests.lowest import ranges
from tests.paths import ROOT, TESTS
from tests.patience import patience

HOUSE = ("kernels", "moe", "recipes", "tools")
# The rooms, lowest first. A file imports from its own room and from those that come before it in this list:
# imports inside functions and those for type checkers count as well. README's map is this list.
ROOMS = (
    *(
        "kernels.text_file",
        "kernels.activations",
        "kernels.plan",
        "kernels.backend",
        "kernels.torch",
        "kernels.cpu",
        "kernels.triton",
    ),
    *("kernels.third_party", "kernels.expert_mlp", "kernels.aot", "kernels.bench", "kernels.tune"),
    *("moe.errors", "moe.types", "moe.registry", "moe.routing", "moe.dispatch", "moe.experts", "moe.routers"),
    *("moe.metrics", "moe.layer", "moe.upcycle", "moe.attention", "moe.accounting", "moe.planning"),
    "moe.scaling_laws",
    *("recipes.runtime", "recipes.checkpoint", "recipes.data", "recipes.models", "recipes.tracking"),
    *("recipes.engines", "recipes.config", "recipes.upcycling", "recipes.training", "recipes.jobs"),
    *("recipes.cap", "recipes.launch", "recipes.studies"),
    *("tools", "train"),
)
MOST_ENTRIES = {"recipes": 13, "moe": 14, "kernels": 12}
# A name says where a file is: each is used once, but for these.
SHARED_NAMES = {"__init__.py", "__main__.py", "base.py", "config.py"}
# The libraries that a part may import beside the standard one. The rest may import every pinned dependency.
THEIRS = {"kernels": {"torch", "triton"}, "moe": {"torch", "numpy", "scipy"}, "train": set[str]()}
HEAVY = {"transformers", "datasets", "megatron", "deepspeed", "wandb", "matplotlib"}
# Adapter files: nothing imports them before their library is needed.
MAY_BE_HEAVY = {
    "recipes/engines/deepspeed/moe_engine.py",
    "recipes/engines/megatron/megatron_engine.py",
    "recipes/engines/megatron/hf_weights.py",
    # Registers a class of transformers: who imports it has transformers already.
    "recipes/models/auto.py",
    # A layer of its cache: nothing needs it before a model of transformers generates.
    "recipes/models/hf/attention_cache.py",
}
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"hydra": "hydra-core", "omegaconf": "hydra-core", "megatron": "megatron-core"}
# What comes with torch, transformers or hydra and is pinned by them.
TRANSITIVE = {"triton", "zstandard", "yaml", "packaging"}
# What another environment runs.
ELSEWHERE = {
    "recipes/cap/certify/vllm_worker.py": {"numpy", "torch", "vllm"},
    "recipes/cap/engine/graft_vllm_experts.py": {"torch", "vllm"},
}


@cache
def sources() -> dict[str, ast.Module]:
    """Path below the root -> syntax tree, of everything but the tests."""
    files = [ROOT / "train.py", *(path for part in HOUSE for path in (ROOT / part).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def part_of(path: str) -> str:
    """``moe`` of ``moe/types.py``, ``train`` of ``train.py``."""
    return path.split("/")[0].removesuffix(".py")


def module_of(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def package_of(path: str) -> str:
    """The package that relative imports in a file start from."""
    module = module_of(path)
    return module if path.endswith("/__init__.py") else module.rpartition(".")[0]


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, str | None]]:
    """Line, module, and the name taken from it (None for ``import x``), wherever in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *filter(None, [base])])
            yield from ((node.lineno, base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, None


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without what only type checkers read."""

    class Prune(ast.NodeTransformer):
        def _drop(self, node: ast.AST) -> None:
            return None

        visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _drop  # noqa: N815

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return node.orelse
            return self.generic_visit(node)

    return Prune().visit(ast.parse(ast.unparse(tree)))


def room_of(module: str) -> int:
    """Returns the place of a module's room in `ROOMS`."""
    names = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    assert names, f"{module} is in no room: put it into one, or a new room into ROOMS"
    return ROOMS.index(max(names, key=len))


def imported_modules() -> Iterator[tuple[str, int, str]]:
    """Yields path, line and the module of ours that is imported there, wherever in a file."""
    modules = {module_of(path) for path in sources()}
    for path, tree in sources().items():
        for line, base, name in imports(tree, package_of(path)):
            target = f"{base}.{name}" if f"{base}.{name}" in modules else base
            if target.split(".")[0] in {*HOUSE, "train", "tests", "conf"}:
                yield path, line, target


def test_imports_go_to_lower_rooms_only() -> None:
    packages = {*HOUSE}  # their __init__ files hold nothing
    wrong = [
        f"{path}:{line} imports {target}"
        for path, line, target in imported_modules()
        if target not in packages and room_of(target) > room_of(module_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_of_rooms_sees_an_import_upwards() -> None:
    assert room_of("moe.routers.topk") > room_of("moe.routing.balance") > room_of("kernels.expert_mlp")
    with pytest.raises(AssertionError, match="in no room"):
        room_of("recipes.loose_file")


def test_only_tools_import_the_studies() -> None:
    wrong = [
        f"{path}:{line} imports {target}"
        for path, line, target in imported_modules()
        if target.startswith("recipes.studies") and not path.startswith(("tools/", "recipes/studies/"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", MOST_ENTRIES)
def test_a_part_fits_on_one_screen(part: str) -> None:
    entries = {path.split("/")[1] for path in sources() if path.startswith(f"{part}/")} - {"__init__.py"}
    assert len(entries) <= MOST_ENTRIES[part], sorted(entries)


def test_no_two_files_share_a_name() -> None:
    paths: dict[str, list[str]] = {}
    for path in sources():
        paths.setdefault(Path(path).name, []).append(path)
    assert not {name: found for name, found in paths.items() if len(found) > 1 and name not in SHARED_NAMES}


def test_docstrings_begin_with_what_is_done() -> None:
    wrong = [
        f"{path}: {text.splitlines()[0]}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (text := ast.get_docstring(node)) and text.split()[0] in ("What", "Of")
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_mirror_the_source() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {
        Path("kernels/interpreted")
    }
    missing = [
        str(folder) for folder in folders if not (ROOT / folder).is_dir() and folder.name != "interpreted"
    ]
    assert not missing, f"tests of folders that are not there: {missing}"


def test_the_map_in_the_readme_is_the_list_of_rooms() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map of the code")[2]
    places = [text.find(f"| `{room.replace('.', '/')}") for room in ROOMS if room.startswith("recipes.")]
    assert -1 not in places and places == sorted(places), (
        "the README's map has not the rooms of recipes/ in order"
    )


def test_others_libraries_are_where_they_belong() -> None:
    pinned = ranges().keys()
    wrong = []
    for path, tree in sources().items():
        allowed = ELSEWHERE.get(path) or THEIRS.get(part_of(path), pinned | TRANSITIVE)
        for line, name, _ in imports(tree, package_of(path)):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in (*HOUSE, "__future__"):
                continue
            if DISTRIBUTIONS.get(top, top) not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    modules = {module_of(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = set()
        for _, base, name in imports(sources()[path], package_of(path)):
            target = f"{base}.{name}"
            found.add(target if target in modules else base)
        graph[module] = (found & modules.keys()) - {module}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert len(done) == len(modules)


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    wrong = [
        f"{path}:{name} at the top level"
        for path, tree in sources().items()
        if path not in MAY_BE_HEAVY
        for _, name, _ in imports(at_import_time(tree), package_of(path))
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kernels", {*HEAVY, "numpy", "torch"}),
        ("moe", {*HEAVY, "numpy", "torch"}),
        ("moe.layer, moe.upcycle, moe.routers", {*HEAVY, "hydra", "pydantic"}),
        ("recipes.launch", {*HEAVY, "torch", "pydantic"}),
        ("recipes.config.schema, recipes.config.places", {*HEAVY, "torch", "scipy"}),
        ("recipes.jobs.preflight", HEAVY),
    ],
)
def test_importing_is_light(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & absent


def test_every_conf_file_holds_values_only() -> None:
    others = [path for path in (ROOT / "conf").rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert not [path for path in others if "__pycache__" not in path.parts and path.name != "__init__.py"]


def test_no_vague_file_names() -> None:
    names = {path for path in sources() if VAGUE_NAMES & set(re.split(r"[/._]", path))}
    assert not names


def test_no_global_state_by_statement() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong


def test_nothing_is_loaded_by_pickle() -> None:
    wrong = []
    for path, tree in sources().items():
        for line, name, _ in imports(tree, package_of(path)):
            if name.split(".")[0] in PICKLES:
                wrong.append(f"{path}:{line} imports {name}")
        wrong += [f"{path}:{node.lineno} {why}" for node in ast.walk(tree) if (why := unsafe(node))]
    assert not wrong, "\n".join(wrong)


def unsafe(node: ast.AST) -> str | None:
    """Why a call may run what is in a file, or None."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
        return "allow_pickle or trust_remote_code set to True"
    if name in ("yaml.load", "yaml.unsafe_load", "eval", "exec"):
        return name
    return None


@pytest.mark.parametrize(
    ("code", "is_unsafe"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("model.eval()", False),
        ("eval(text)", True),
        ("ast.literal_eval(text)", False),
    ],
)
def test_the_check_for_unsafe_calls_sees_them(code: str, is_unsafe: bool) -> None:
    assert any(unsafe(node) for node in ast.walk(ast.parse(code))) is is_unsafe


def test_the_walk_sees_every_form_of_import() -> None:
    code = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nfrom ..h import i\n"
        "def j():\n    import k\nimportlib.import_module('l.m')\n"
    )
    found = {(base, name) for _, base, name in imports(ast.parse(code), "p.q")}
    expected = {
        ("a.b", None),
        ("c", "d"),
        ("p.q", "e"),
        ("p.q.f", "g"),
        ("p.h", "i"),
        ("k", None),
        ("l.m", None),
    }
    assert found == expected
    early = {base for _, base, _ in imports(at_import_time(ast.parse(code)), "p.q")}
    assert early == {"a.b", "c", "p.q", "p.q.f", "p.h", "l.m"}


def test_the_package_of_the_same_name_is_not_installed() -> None:
    # transformers probes for the PyPI package `kernels`, and would find ours in its place.
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_the_lock_holds_the_upper_end_of_every_range() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    locked = {plain(line) for line in lines if line.strip() and not line.startswith(("#", "-"))}
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^=]+", pin) for pin in locked), "every line pins one version"
    assert {f"{plain(name)}=={ends[-1]}" for name, ends in ranges().items()} <= locked


def test_ranges_have_both_ends_in_order() -> None:
    assert not [name for name, ends in ranges().items() if Version(ends[0]) > Version(ends[-1])]
    assert [name for name, ends in ranges().items() if len(ends) == 2] >= ["deepspeed"]


def plain(pin: str) -> str:
    """A pin without environment markers, in one spelling."""
    return pin.split(";")[0].strip().lower().replace("_", "-")


def test_print_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    files, functions = [], []
    for path, tree in sources().items():
        files.append((len((ROOT / path).read_text(encoding="utf-8").splitlines()), path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((lines, f"{path}:{node.lineno} {node.name}"))
    with capsys.disabled():
        print("\nlines  largest files, largest functions")
        for lines, name in [*sorted(files, reverse=True)[:5], *sorted(functions, reverse=True)[:5]]:
            print(f"{lines:5}  {name}")
