"""Commands of other programs: their words, their reasons, their time."""

from __future__ import annotations

import pytest

from recipes.cap.certify.base import ConsumerError
from recipes.cap.certify.vllm_consumer import run_program


def test_what_it_prints_holds_errors_as_well() -> None:
    assert run_program(["sh", "-c", "echo a; echo version: 7 >&2"], "it", 60) == "a\nversion: 7\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'load: error loading model: missing tensor' >&2; echo 'E unable to load' >&2",
            "load: error .*tensor",
        ),
        ("echo one >&2; echo two >&2", "two"),
        ("echo only this", "only this"),
        ("true", "it said nothing, and its exit code is 3"),
    ],
)
def test_the_line_that_says_why(script: str, said: str) -> None:
    with pytest.raises(ConsumerError, match=f"it failed: {said}$"):
        run_program(["sh", "-c", f"{script}; exit 3"], "it", 60)


def test_one_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ConsumerError, match=r"it took longer than 0.05 s \(--time-limit\)"):
        run_program(["sleep", "60"], "it", 0.05)
