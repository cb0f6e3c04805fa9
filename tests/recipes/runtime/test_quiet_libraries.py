"""Other libraries are quiet, unless a user wants to hear them."""

from __future__ import annotations

import os
import sys
import warnings

import pytest

from recipes.runtime.quiet_libraries import quiet_libraries

NAMES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def heard(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> list[str]:
    """What is heard of three warnings, by a process with these ``-W`` options."""
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        quiet_libraries()
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.warn(category.__name__, category, stacklevel=1)
    return [str(one.message) for one in caught]


def test_changes_to_come_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard(monkeypatch, []) == ["UserWarning"]
    assert [os.environ[name] for name in NAMES] == ["error", "1"]


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    assert heard(monkeypatch, ["default"]) == ["FutureWarning", "DeprecationWarning", "UserWarning"]
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
