"""Every choice of ``conf/upcycle`` goes through the whole job: surgery, training, export, reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.compose import CONF
from tests.jobs.job_runs import job, summary, write_text

pytestmark = pytest.mark.slow

METHODS = sorted(path.stem for path in (CONF / "upcycle").glob("*.yaml"))
# Exact under the default router, top-2 with weights that sum to 1.
EXACT = ("copy", "shared_dense", "shared_routed", "virtual_group")
# Sum their experts at weight 1, which the default router does not, and say so.
NEEDS_UNIT_WEIGHTS = ("cmoe", "moefication", "snake")
# What goes with a method on the tiny host, whose two networks are 48 wide.
WITH: dict[str, dict[str, object]] = {
    "cmoe": {"router": "analytical"},
    "llama_moe_v2": {"upcycle.num_experts": 3, "upcycle.layers": "all"},
    "snake": {"router": "one_plus"},
}
# Refuses the host: its neurons are never 0.
NEEDS_RELU = "moefication"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the dense model is trained once."""
    folder = tmp_path_factory.mktemp("methods")
    write_text(folder / "text")
    return folder


def options(workplace: Path, method: str) -> dict[str, object]:
    """A run of two steps."""
    return {
        "upcycle": method,
        "run.name": method,
        "data.path": str(workplace / "text" / "*.txt"),
        "compare.cpt": False,
        "train.steps": 2,
        "optim.schedule.warmup_steps": 0,
        "calibration.samples": 16,
    } | WITH.get(method, {})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, workplace: Path) -> None:
    chosen = options(workplace, method)
    if method == "branch_train_mix":
        # The embedded default itself, from the cache, as a branch.
        assert job(workplace, options(workplace, "copy") | {"run.name": "seed"}).code == 0
        (branch,) = (workplace / "cache").glob("dense-*/hf")
        chosen["upcycle.sources"] = f"[{branch}]"
    ended = job(workplace, chosen)
    if method == NEEDS_RELU:
        assert ended.code == 2
        assert "ReLU" in ended.err
        return
    assert ended.code == 0, ended.err
    found = summary(workplace / "outputs" / method)
    assert found["exactness"]["claimed_exact"] == (method in EXACT), found["exactness"]
    assert found["export"]["relative"] < 1e-4
    assert [row["model"] for row in found["results"]] == ["dense", "moe"]
    if method == "branch_train_mix":
        # A branch that is the seed makes copies, though that is not claimed.
        assert found["exactness"]["relative"] < 1e-5


@pytest.mark.parametrize("method", NEEDS_UNIT_WEIGHTS)
def test_a_method_that_sums_says_so_to_a_router_that_averages(method: str, workplace: Path) -> None:
    ended = job(workplace, options(workplace, method) | {"router": "topk"})
    assert ended.code == 2
    assert "router.name='topk'" in ended.err
