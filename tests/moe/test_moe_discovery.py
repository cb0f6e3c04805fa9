"""Discovery, the run as layers see it, and errors that people read."""

from __future__ import annotations

import pickle
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import torch

from moe import errors
from moe.dispatch import dispatcher_classes
from moe.errors import ConfigError, GraftError, Mistake, UserError
from moe.registry import discover
from moe.routers import router_classes
from moe.types import Config
from moe.upcycle import upcycle_methods
from tests.moe.routers.routing_cases import make_context


class Animal(ABC):
    """What the packages of these tests are searched for."""

    name: str

    @abstractmethod
    def speak(self) -> str:
        """Makes it abstract."""


BASE = f"from {__name__} import Animal\n"
CLASS = "class {cls}(Animal):\n    name = '{name}'\n    def speak(self):\n        return ''\n"


def _package(folder: Path, name: str, modules: dict[str, str]) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("", encoding="utf-8")
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text, encoding="utf-8")


def test_concrete_classes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "zoo": BASE + CLASS.format(cls="Zebra", name="zebra") + CLASS.format(cls="Ant", name="ant"),
        "house": BASE + "class Pet(Animal):\n    tame = True\n" + CLASS.format(cls="Mouse", name="mouse"),
        "borrowed": "from found_animals.zoo import Zebra\nclass Stone:\n    name = 'stone'\n",
    }
    _package(tmp_path, "found_animals", modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = discover("found_animals", Animal)
    # Alphabetical; the abstract Pet, the imported Zebra and the unrelated Stone are not counted.
    assert list(found) == ["ant", "mouse", "zebra"]
    assert [cls.__name__ for cls in found.values()] == ["Ant", "Mouse", "Zebra"]
    assert found["zebra"] is sys.modules["found_animals.zoo"].Zebra


def test_two_classes_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {m: BASE + CLASS.format(cls=m.title(), name="cat") for m in ("first", "second")}
    _package(tmp_path, "twin_animals", modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AssertionError, match="Second.* and .*First.* share the name 'cat'"):
        discover("twin_animals", Animal)


def test_a_class_that_leaves_something_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Or it would be left out in silence: "there is no such animal".
    _package(tmp_path, "mute_animals", {"fish": BASE + "class Fish(Animal):\n    name = 'fish'\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AssertionError, match="fish.Fish.* does not define speak"):
        discover("mute_animals", Animal)


def test_what_the_library_brings_is_found() -> None:
    assert "topk" in router_classes() and "copy" in upcycle_methods() and "local" in dispatcher_classes()
    for found in (router_classes(), upcycle_methods(), dispatcher_classes()):
        assert list(found) == sorted(found)
        assert all(cls.name == name for name, cls in found.items())


def test_configs_refuse_unknown_keys() -> None:
    for cls in (*router_classes().values(), *upcycle_methods().values()):
        assert issubclass(cls.config_class, Config)
        assert cls.config_class.__pydantic_config__ == {"extra": "forbid"}


def test_token_mask_of_a_layer() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    context = make_context(padding_mask=mask)
    found = context.token_mask_T(4)
    assert found is not None and found.tolist() == [True, False, True, True]
    assert context.token_mask_T(5) is None and make_context().token_mask_T(4) is None


def test_every_mistake_is_in_the_message() -> None:
    mistakes = [
        Mistake("router.top_k", 9, "a token cannot use more than 4 experts", "Set it to 4 or less."),
        Mistake("--dense", "x", "there is no such folder", "Give a folder."),
    ]
    error = ConfigError(mistakes)
    assert str(error) == (
        "router.top_k=9: a token cannot use more than 4 experts. Set it to 4 or less.\n"
        "--dense='x': there is no such folder. Give a folder."
    )
    assert error.mistakes == tuple(mistakes)
    with pytest.raises(AssertionError, match="at least one mistake"):
        UserError([])


@pytest.mark.parametrize(
    "cls", [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, UserError)]
)
def test_errors_survive_the_way_to_other_ranks(cls: type[UserError]) -> None:
    error = cls.one("a.b", 3, "three is too many", "Use two.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls and again.mistakes == error.mistakes and str(again) == str(error)
    assert cls.exit_code == 2 and issubclass(cls, GraftError)


def test_our_own_failures_exit_differently() -> None:
    assert GraftError.exit_code == errors.ExactnessError.exit_code == 1
