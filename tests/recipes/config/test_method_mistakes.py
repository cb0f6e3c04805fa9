"""What a method cannot do with a router or a dense network is told before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.errors import Mistake
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.jobs.upcycle_job import UpcycleJob
from tests.conftest import MakeCheckpoint


def mistakes(*overrides: str) -> list[Mistake]:
    """Those of a run that concern method and router."""
    config = parse_config(compose_config(["+recipe=upcycle", *overrides]))
    return [m for m in UpcycleJob().check(config, 1) if m.path.startswith(("upcycle.", "router."))]


@pytest.mark.parametrize(
    "method", ["drop", "virtual_group", "shuffle_slice", "shared_dense", "shared_routed"]
)
def test_the_defaults_fit_the_embedded_model(method: str) -> None:
    assert mistakes(f"upcycle={method}") == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["upcycle=virtual_group", "upcycle.granularity=3", "upcycle.num_experts=9", "router.top_k=3"],
            "upcycle.granularity=3: the 352 neurons of the dense network do not divide into 3 parts. "
            "Set a divisor.",
        ),
        (
            ["upcycle=virtual_group", "router.top_k=3"],
            "router.top_k=3: a token must use whole virtual groups, of 2 experts each. Set a multiple of 2.",
        ),
        (
            ["upcycle=virtual_group", "router=noisy_topk"],
            "router.noise_scale=1.0: in training it separates the experts of a virtual group, whose rows are "
            "equal. Set router.noise_scale=0, or choose a router without it, such as topk.",
        ),
        (
            ["upcycle=branch_train_mix"],
            "upcycle.sources=[]: there is nothing to mix. List the folders of models that were trained on "
            "from the dense one, or take upcycle=copy.",
        ),
        (
            ["upcycle=partition", "upcycle.num_experts=7"],
            "upcycle.num_experts=7: the 352 neurons of the dense network do not divide into 7 parts. Set a "
            "divisor.",
        ),
    ],
)
def test_mistakes_of_a_run_on_the_embedded_model(overrides: list[str], expected: str) -> None:
    assert [str(mistake) for mistake in mistakes(*overrides)] == [expected]


def test_a_checkpoint_tells_its_width(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    # 48 neurons divide by 4 and 8, not by 5.
    dense = f"dense={make_checkpoint('llama')}"
    chosen = ["upcycle=virtual_group", "upcycle.granularity=5", "upcycle.num_experts=10", "router.top_k=5"]
    (found,) = mistakes(dense, *chosen)
    assert (found.path, found.value) == ("upcycle.granularity", 5) and "the 48 neurons" in found.rule
    # Where the folder is wrong, the rest is checked all the same.
    nowhere = f"dense={tmp_path / 'nothing'}"
    assert [m.path for m in mistakes(nowhere, "upcycle=virtual_group", "router.top_k=3")] == ["router.top_k"]
    (missing,) = mistakes(dense, "upcycle=branch_train_mix", f"upcycle.sources=[{tmp_path / 'nothing'}]")
    assert (missing.path, missing.rule) == ("upcycle.sources.0", "the folder does not exist")


def test_a_router_that_is_wrong_itself_is_told_once() -> None:
    (found,) = mistakes("upcycle=virtual_group", "router.top_k=99")
    assert found.path == "router.top_k" and "more experts than the 8" in found.rule
